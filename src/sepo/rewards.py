"""Token rewards: how much more the oracle believes in a token than the reference does.

    s_i = log pi_oracle(y_i | x, y_<i) - log pi_reference(y_i | x, y_<i)      (arXiv 2408.13518, Theorem 1)

The DPO reward of a token is beta * s_i; beta does not change any ranking and is left out. For an oracle trained with
DPO the rewards of a response sum to its reward, up to a term of the prompt alone: that sum is what Theorem 1 fixes.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from sepo.errors import UserError
from sepo.tables import flat, make_table, provenance_of, ragged


def token_rewards(pairs: pa.Table, oracle: pa.Table, reference: pa.Table) -> pa.Table:
    """Join pairs with two log-probability tables into a table of kind "scores".

    Args:
        pairs: kind "pairs", `n` rows.
        oracle, reference: kind "logps", the same rows in the same order.

    Raises:
        UserError: the tables do not belong to the same pairs.
    """
    for name, logps in (("oracle", oracle), ("reference", reference)):
        if logps.column("pair_id").to_pylist() != pairs.column("pair_id").to_pylist():
            raise UserError(f"the {name} log-probabilities are not those of these pairs: score the same data with both")
    columns: dict[str, object] = {name: pairs.column(name) for name in pairs.column_names}
    for side in ("chosen", "rejected"):
        after, lengths = flat(oracle.column(f"{side}_logps"))
        before, before_lengths = flat(reference.column(f"{side}_logps"))
        _, ids_lengths = flat(pairs.column(f"{side}_ids"))
        if not (np.array_equal(lengths, ids_lengths) and np.array_equal(before_lengths, ids_lengths)):
            raise UserError(f"the {side} log-probabilities are not as long as the responses: score the same data again")
        columns[f"{side}_rewards"] = ragged(after - before, lengths)
    provenance = {
        **{key: value for key, value in provenance_of(pairs).items() if key not in ("format", "version")},
        "oracle": provenance_of(oracle).get("model"),
        "reference": provenance_of(reference).get("model"),
    }
    return make_table("scores", columns, provenance)


def response_sums(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Sum a token column over each response.

    Args:
        table: kind "scores" or "logps".
        column: "rewards" or "logps", the part of the column name after `chosen_` and `rejected_`.

    Returns:
        chosen and rejected sums, each `[rows]` float64.
    """
    sums = []
    for side in ("chosen", "rejected"):
        values, lengths = flat(table.column(f"{side}_{column}"))
        running = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
        ends = np.cumsum(lengths)
        sums.append(running[ends] - running[ends - lengths])
    return sums[0], sums[1]
