"""Token rewards: the log-ratio of oracle and reference for each token.

    s_i = log pi_oracle(y_i | x, y_<i) - log pi_reference(y_i | x, y_<i)      (arXiv 2408.13518, Theorem 1)

The DPO reward of a token is beta * s_i; beta does not change any ranking and is left out. For an oracle trained with
DPO the token rewards of a response sum to the reward of the response, up to a term that depends on the prompt only.
Theorem 1 determines this sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from sepo.data.ragged import SIDES, flat, ragged, segment_sums
from sepo.data.tables import make_table, provenance_of, require_table
from sepo.errors import UserError, wrong_type


def pair_rewards(pairs: pa.Table, oracle: pa.Table, reference: pa.Table) -> pa.Table:
    """Join pairs with two log-probability tables into a table of kind "scores".

    Args:
        pairs: kind "pairs", `n` rows.
        oracle, reference: kind "logps", the same rows in the same order.

    Raises:
        UserError: the tables do not belong to the same pairs.
    """
    require_table("pairs", pairs, "pairs")
    for name, logps in (("oracle", oracle), ("reference", reference)):
        require_table(name, logps, "logps")
        if logps.column("pair_id").to_pylist() != pairs.column("pair_id").to_pylist():
            raise UserError(f"the {name} log-probabilities belong to other pairs: score the same data with both models")
    columns: dict[str, object] = {name: pairs.column(name) for name in pairs.column_names}
    for side in SIDES:
        after, lengths = flat(oracle.column(f"{side}_logps"))
        before, before_lengths = flat(reference.column(f"{side}_logps"))
        _, ids_lengths = flat(pairs.column(f"{side}_ids"))
        if not (np.array_equal(lengths, ids_lengths) and np.array_equal(before_lengths, ids_lengths)):
            raise UserError(f"the {side} log-probabilities and responses differ in length: score the same data again")
        columns[f"{side}_rewards"] = ragged(after - before, lengths)
    provenance = {
        **provenance_of(pairs),
        "oracle": provenance_of(oracle).get("model"),
        "reference": provenance_of(reference).get("model"),
    }
    return make_table("scores", columns, provenance)


def given_rewards(pairs: pa.Table, given: pa.Table, columns: tuple[str, str], missing: bool = False) -> pa.Table:
    """Turn imported rewards or weights into a table of kind "scores".

    Args:
        pairs: kind "pairs".
        given: pair_id, and `columns`: lists of chosen and rejected rewards, one number a token. Rows in any order.
        missing: leave out pairs that `given` lacks, instead of raising an error.

    Raises:
        UserError: a pair is missing or occurs twice, or lacks a finite number for one of its tokens.
    """
    wanted, given_ids = pairs.column("pair_id").to_numpy(), given.column("pair_id").to_numpy()
    if len(np.unique(given_ids)) < len(given_ids):
        raise UserError("the given rewards hold a pair_id twice: expected one row a pair")
    known = np.isin(wanted, given_ids)
    if not known.all() and not missing:
        raise UserError(
            f"the given rewards lack {np.count_nonzero(~known):,} of {len(wanted):,} pairs, the first pair_id "
            f"{wanted[~known][0]}: expected a row for each pair (pair_id is the row of the dataset)"
        )
    pairs = pairs.filter(pa.array(known))
    order = np.argsort(given_ids, kind="stable")
    rows = order[np.searchsorted(given_ids, wanted[known], sorter=order)]
    scores: dict[str, object] = {name: pairs.column(name) for name in pairs.column_names}
    for side, name in zip(SIDES, columns, strict=True):
        values, lengths = flat(given.column(name).take(pa.array(rows)).cast(pa.list_(pa.float32())))
        _, tokens = flat(pairs.column(f"{side}_ids"))
        if (wrong := np.flatnonzero(lengths != tokens)).size:
            at = wrong[0]
            raise UserError(
                f"the given rewards, column '{name}': pair {wanted[known][at]} has {lengths[at]} numbers for a "
                f"response of {tokens[at]} tokens; expected one for each token of the reference's tokenizer, the end "
                "of the response included"
            )
        if not np.isfinite(values).all():
            raise UserError(f"the given rewards, column '{name}', hold numbers that are not finite")
        scores[f"{side}_rewards"] = ragged(values, lengths)
    return make_table(
        "scores", scores, {**provenance_of(pairs), "oracle": None, "reference": None, "given": list(columns)}
    )


def require_rewards(tables: Iterable[pa.Table]) -> None:
    """Raise a UserError if every reward of a dataset is 0, so that tokens cannot be ranked.

    Args:
        tables: of kind "scores"; tables without rows pass.
    """
    rows = 0
    for table in tables:
        rows += len(table)
        if any(bool(flat(table.column(f"{side}_rewards"))[0].any()) for side in SIDES):
            return
    if rows:
        raise UserError("every token reward is 0: oracle and reference are the same model; was the oracle trained?")


def response_sums(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Sum a token column over each response.

    Args:
        table: kind "scores" or "logps".
        column: "rewards" or "logps", the column name without `chosen_` or `rejected_`.

    Returns:
        chosen and rejected sums, each `[rows]` float64.
    """
    chosen, rejected = (segment_sums(*flat(table.column(f"{side}_{column}"))) for side in SIDES)
    return chosen, rejected


def target_sums(table: pa.Table, logps: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Weighted sum of log-probabilities over the target tokens of each response.

    Args:
        table: kind "selection" (target tokens are the key tokens) or "pairs" (target tokens are all tokens).
        logps: kind "logps", row for row with `table`.

    Returns:
        chosen and rejected sums, each `[rows]` float64.
    """
    if "chosen_positions" not in table.column_names:
        return response_sums(logps, "logps")
    sums = []
    for side in SIDES:
        values, lengths = flat(logps.column(f"{side}_logps"))
        positions, counts = flat(table.column(f"{side}_positions"))
        weights, _ = flat(table.column(f"{side}_weights"))
        starts = np.repeat(np.cumsum(lengths) - lengths, counts)
        rows = np.repeat(np.arange(len(counts)), counts)
        kept = values[starts + positions].astype(np.float64) * weights
        sums.append(np.bincount(rows, kept, minlength=len(counts)))
    return sums[0], sums[1]


def combine_scores(tables: Sequence[pa.Table], how: str = "mean") -> pa.Table:
    """Join the token rewards of several oracles into one table of kind "scores".

    Args:
        tables: kind "scores", the same pairs in the same order.
        how: "mean", or "min": the pessimistic minimum, a lower bound of the reward over the oracles (Theorem 2 gives
            this bound in expectation for one oracle on part of the data).

    Raises:
        UserError: the tables do not hold the same pairs, or `how` is neither.
    """
    if how not in ("mean", "min"):
        raise UserError(f"combine is '{how}': expected mean or min")
    if not isinstance(tables, list | tuple) or not tables:
        raise wrong_type("tables", tables, "a list of at least one score table")
    for number, table in enumerate(tables):
        require_table(f"table {number}", table, "scores")
    first = tables[0]
    columns: dict[str, object] = {name: first.column(name) for name in first.column_names}
    for side in SIDES:
        ids, lengths = flat(first.column(f"{side}_ids"))
        stack = []
        for table in tables:
            table_ids, table_lengths = flat(table.column(f"{side}_ids"))
            if not (np.array_equal(table_lengths, lengths) and np.array_equal(table_ids, ids)):
                raise UserError("the score tables do not hold the same pairs: score the same data with each oracle")
            stack.append(flat(table.column(f"{side}_rewards"))[0])
        joined = np.mean(stack, 0) if how == "mean" else np.min(stack, 0)
        columns[f"{side}_rewards"] = ragged(joined.astype(np.float32), lengths)
    oracles = [provenance_of(table).get("oracle") for table in tables]
    return make_table("scores", columns, {**provenance_of(first), "oracle": oracles, "combined": how})
