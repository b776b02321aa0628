"""Key tokens: the tokens of a response that the policy is trained on.

The paper's rule (arXiv 2408.13518, section 3.3): of a chosen response of n tokens keep the floor(k n) tokens with the
highest reward, of a rejected one the floor(k n) with the lowest, at least one each, ties to the earlier token. Here the
token that ends a response is left out unless asked for (see `select_key_tokens`). All responses of a table are ranked
in one sort.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def extreme_positions(
    rewards: np.ndarray, lengths: np.ndarray, counts: np.ndarray, highest: bool, eligible: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the `counts[i]` highest (or lowest) rewards in each response, ascending within a response.

    Args:
        rewards: `[sum(lengths)]`, all responses one after the other.
        lengths: `[n]` tokens in each response.
        counts: `[n]` tokens to keep of each, at most its length.
        highest: keep the highest rewards, else the lowest; ties go to the earlier token.
        eligible: `[sum(lengths)]` bool, the tokens that may be kept; a response with none keeps its best token anyway.

    Returns:
        positions `[sum(kept)]` int64, counted from the start of the own response, and `kept` `[n]`, their number:
        `counts` unless fewer tokens are eligible.
    """
    response = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    position = np.arange(len(rewards)) - starts
    barred = np.zeros(len(rewards), bool) if eligible is None else ~eligible
    order = np.lexsort((position, -rewards if highest else rewards, barred, response))
    rank = np.arange(len(rewards)) - starts  # of the sorted tokens: responses stay in place
    allowed = np.bincount(response[~barred], minlength=len(lengths))
    kept_counts = np.minimum(counts, np.maximum(1, allowed))
    kept = order[rank < kept_counts[response]]
    return position[np.sort(kept)], kept_counts


def ends_response(ids: np.ndarray, lengths: np.ndarray, end_ids: Sequence[int]) -> np.ndarray:
    """Mark the token that ends each response, if it is an end of turn or text: `[sum(lengths)]` bool."""
    marks = np.zeros(len(ids), bool)
    last = np.cumsum(lengths)[lengths > 0] - 1
    marks[last] = np.isin(ids[last], np.asarray(end_ids, dtype=ids.dtype))
    return marks


def select_key_tokens(
    scores: pa.Table, k_chosen: float = 0.3, k_rejected: float = 0.3, include_end: bool = False
) -> pa.Table:
    """Apply the rule to a table of kind "scores"; returns a table of kind "selection", row for row.

    Args:
        scores: with the provenance that `tokenize_pairs` gives (its `end_ids` name the end-of-response tokens).
        k_chosen, k_rejected: share of a response's tokens to keep.
        include_end: let the end-of-response token compete, as in the paper. An oracle may reward ending on both
            sides alike; taking the highest of one side and the lowest of the other then keeps the end in chosen
            responses only, an asymmetry that says nothing about the preference (results/README.md).

    Raises:
        UserError: a rate lies outside (0, 1].
    """
    provenance = {key: value for key, value in provenance_of(scores).items() if key not in ("format", "version")}
    columns: dict[str, object] = {name: scores.column(name) for name in scores.column_names}
    for side, rate, highest in (("chosen", k_chosen, True), ("rejected", k_rejected, False)):
        check_rate(f"k_{side}", rate)
        rewards, lengths = flat(scores.column(f"{side}_rewards"))
        ids, _ = flat(scores.column(f"{side}_ids"))
        eligible = None if include_end else ~ends_response(ids, lengths, provenance.get("end_ids", []))
        positions, counts = extreme_positions(rewards, lengths, keep_counts(lengths, rate), highest, eligible)
        columns[f"{side}_positions"] = ragged(positions.astype(np.int32), counts)
        columns[f"{side}_weights"] = ragged(np.ones(len(positions), np.float32), counts)
    settings = {"k_chosen": k_chosen, "k_rejected": k_rejected, "include_end": include_end}
    return make_table("selection", columns, {**provenance, **settings})


def check_rate(name: str, rate: float) -> None:
    """Raise a UserError unless 0 < rate <= 1."""
    if not 0 < rate <= 1:
        raise UserError(f"{name} is {rate}: the share of tokens to keep must be above 0 and at most 1, for example 0.3")
