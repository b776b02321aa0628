"""Key tokens: the tokens of a response that the policy is trained on.

The paper's rule (arXiv 2408.13518, section 3.3): of a chosen response of n tokens keep the floor(k n) tokens with the
highest reward, of a rejected one the floor(k n) with the lowest, at least one each, ties to the earlier token. All
responses of a table are ranked in one sort.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from sepo.errors import UserError
from sepo.tables import flat, make_table, provenance_of, ragged


def keep_counts(lengths: np.ndarray, rate: float) -> np.ndarray:
    """Number of tokens to keep of responses of `lengths` tokens: floor(rate * n), at least 1.

    The floor forgives a product that misses a whole number by rounding (0.29 * 100 is 28.999...).

    >>> keep_counts(np.array([1, 3, 10, 100]), 0.29)
    array([ 1,  1,  2, 29])
    """
    return np.maximum(1, np.floor(rate * lengths + 1e-9).astype(np.int64))


def extreme_positions(rewards: np.ndarray, lengths: np.ndarray, counts: np.ndarray, highest: bool) -> np.ndarray:
    """Positions of the `counts[i]` highest (or lowest) rewards in each response, ascending within a response.

    Args:
        rewards: `[sum(lengths)]`, all responses one after the other.
        lengths: `[n]` tokens in each response.
        counts: `[n]` tokens to keep of each, at most its length.
        highest: keep the highest rewards, else the lowest; ties go to the earlier token.

    Returns:
        `[sum(counts)]` int64, positions counted from the start of the own response.
    """
    response = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    position = np.arange(len(rewards)) - starts
    order = np.lexsort((position, -rewards if highest else rewards, response))
    rank = np.arange(len(rewards)) - starts  # of the sorted tokens: responses stay in place
    kept = order[rank < counts[response]]
    return position[np.sort(kept)]


def select_key_tokens(scores: pa.Table, k_chosen: float = 0.3, k_rejected: float = 0.3) -> pa.Table:
    """Apply the paper's rule to a table of kind "scores"; returns a table of kind "selection", row for row.

    Raises:
        UserError: a rate lies outside (0, 1].
    """
    columns: dict[str, object] = {name: scores.column(name) for name in scores.column_names}
    for side, rate, highest in (("chosen", k_chosen, True), ("rejected", k_rejected, False)):
        check_rate(f"k_{side}", rate)
        rewards, lengths = flat(scores.column(f"{side}_rewards"))
        counts = keep_counts(lengths, rate)
        positions = extreme_positions(rewards, lengths, counts, highest)
        columns[f"{side}_positions"] = ragged(positions.astype(np.int32), counts)
        columns[f"{side}_weights"] = ragged(np.ones(len(positions), np.float32), counts)
    provenance = {key: value for key, value in provenance_of(scores).items() if key not in ("format", "version")}
    return make_table("selection", columns, {**provenance, "k_chosen": k_chosen, "k_rejected": k_rejected})


def check_rate(name: str, rate: float) -> None:
    """Raise a UserError unless 0 < rate <= 1."""
    if not 0 < rate <= 1:
        raise UserError(f"{name} is {rate}: the share of tokens to keep must be above 0 and at most 1, for example 0.3")
