"""Stage "score": the reward of every response token, and the oracle's accuracy on held-out pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from sepo import processes
from sepo.credit.rewards import combine_scores, given_rewards, pair_rewards, require_rewards
from sepo.data.ragged import SIDES, flat, ragged
from sepo.data.tables import (
    arrow_file,
    clear_shards,
    iter_tables,
    make_table,
    number_of_rows,
    provenance_of,
    read_shard,
    read_table,
    table_digest,
    table_paths,
    write_shard,
)
from sepo.errors import UserError, one_line
from sepo.evaluate.accuracy import oracle_accuracy
from sepo.processes import log
from sepo.recipe.settings import Recipe
from sepo.stages.data import has_own_rows
from sepo.stages.logps import part_of
from sepo.stages.stage import PARTS, SCORES, SCORES_HELD_OUT, Stage, StageResult

if TYPE_CHECKING:
    from sepo.evaluate.words import Truth

_TABLES = {"train": SCORES, "held_out": SCORES_HELD_OUT}
_LOOKED_AT = 20  # shards, evenly spread, in which swapped labels are looked for


class Words(NamedTuple):
    """Words that carry a gold reward, for judging token rewards: the tokenizer, and the name of the gold reward."""

    tokenizer: PreTrainedTokenizerBase
    gold: str


def stage(
    pairs: StageResult,
    oracle_logps: Sequence[StageResult],
    reference_logps: StageResult | Sequence[StageResult],
    words: Words | None = None,
) -> Stage:
    """Token rewards of all pairs, the mean over oracles, in `scores` and `scores_held_out`.

    Args:
        reference_logps: those of the reference, or of each oracle's opposite.
        words: also judge the rewards by the words of a gold reward.
    """

    one = isinstance(reference_logps, StageResult)
    references = (
        [reference_logps] * len(oracle_logps) if isinstance(reference_logps, StageResult) else list(reference_logps)
    )

    def write(folder: Path) -> dict[str, Any]:
        for part in PARTS:
            oracles = [part_of(logps.folder, part) for logps in oracle_logps]
            bases = [part_of(logps.folder, part) for logps in references]
            score_pairs(pairs.folder / part, oracles, bases, folder / _TABLES[part])
        return _judged(folder, words)

    return Stage(
        kind="score",
        what=("token rewards" if one else "token rewards against the opposite")
        + (f", the mean of {len(oracle_logps)} oracles" if len(oracle_logps) > 1 else ""),
        depends={
            "oracle": [logps.content for logps in oracle_logps],
            "reference": references[0].content if one else [logps.content for logps in references],
            "pairs": pairs.content,
            "words": words is not None and words.gold,
        },
        outputs=(SCORES, SCORES_HELD_OUT),
        run=lambda folder: processes.on_main(lambda: write(folder)),
        facts={},
    )


def given_stage(recipe: Recipe, pairs: StageResult, words: Words | None = None) -> Stage:
    """Given token rewards, in `scores` and `scores_held_out` (the held-out pairs that have rewards).

    A held-out split or source counts its rows from 0 again, so its `pair_id`s do not name rows of the rewards.
    """
    source, names = Path(str(recipe.oracle.rewards)), recipe.oracle.reward_columns
    given = processes.on_main(lambda: check_rewards_file(source, names))

    def rewards() -> Callable[[pa.Table, str], pa.Table]:
        rewards = read_rewards(source, names)

        def of_pairs(table: pa.Table, part: str) -> pa.Table:
            if part == "held_out" and has_own_rows(recipe.data):
                table = table.slice(0, 0)
            return given_rewards(table, rewards, names, missing=part == "held_out")

        return of_pairs

    depends = {"given": given, "columns": list(names)}
    return _without_oracle(f"token rewards of {source.name}", depends, rewards, pairs, words)


def truth_stage(pairs: StageResult, words: Words) -> Stage:
    """What each token is worth by the gold reward, in place of token rewards."""

    def rewards() -> Callable[[pa.Table, str], pa.Table]:
        from sepo.evaluate.gold import gold_reward

        truth = gold_reward(words.gold).truth
        return lambda table, part: true_rewards(words.tokenizer, table, truth)

    return _without_oracle(f"the truth by {words.gold}", {"truth": True}, rewards, pairs, words)


def true_rewards(tokenizer: PreTrainedTokenizerBase, pairs: pa.Table, truth: Truth) -> pa.Table:
    """A table of kind "scores" with the value of each token, 0 outside words (`evaluate.fidelity.token_truth`)."""
    from sepo.evaluate.fidelity import token_truth

    columns: dict[str, object] = {name: pairs.column(name) for name in pairs.column_names}
    for side in SIDES:
        values = np.nan_to_num(token_truth(tokenizer, pairs, side, truth)).astype(np.float32)
        columns[f"{side}_rewards"] = ragged(values, flat(pairs.column(f"{side}_ids"))[1])
    return make_table("scores", columns, {**provenance_of(pairs), "oracle": None, "reference": None})


def _without_oracle(
    what: str,
    depends: dict[str, Any],
    rewards: Callable[[], Callable[[pa.Table, str], pa.Table]],
    pairs: StageResult,
    words: Words | None,
) -> Stage:
    """Token rewards that no model gives: `rewards()` returns a function from pairs, and their part, to scores."""

    def write(folder: Path) -> dict[str, Any]:
        of_pairs = rewards()
        for part in PARTS:
            shards = table_paths(pairs.folder / part, "pairs")
            clear_shards(folder / _TABLES[part])
            for index, path in enumerate(shards):
                write_shard(folder / _TABLES[part], index, of_pairs(read_shard(path, "pairs"), part), len(shards))
        require_rewards(iter_tables(folder / SCORES, "scores"))
        return _judged(folder, words)

    return Stage(
        kind="score",
        what=what,
        depends={**depends, "pairs": pairs.content, "words": words is not None and words.gold},
        outputs=(SCORES, SCORES_HELD_OUT),
        run=lambda folder: processes.on_main(lambda: write(folder)),
        facts={},
    )


def _judged(folder: Path, words: Words | None) -> dict[str, Any]:
    """Held-out accuracy of the rewards and, with `words`, their AUC for the words of the gold reward."""
    shards = table_paths(folder / SCORES_HELD_OUT, "scores")
    rows = sum(number_of_rows(path) for path in shards)
    results: dict[str, Any] = oracle_accuracy(read_shard(path, "scores") for path in shards) if rows else {}
    return results | words_found(folder / SCORES, words)


def words_found(scores: Path, words: Words | None) -> dict[str, float]:
    """AUC of token rewards for the words that carry a gold reward; nothing without one."""
    if words is None:
        return {}
    from sepo.evaluate.fidelity import fidelity
    from sepo.evaluate.gold import gold_reward

    judged = fidelity(words.tokenizer, read_table(scores, "scores"), truth=gold_reward(words.gold).truth)
    return {"fidelity/auc": judged["auc"], "fidelity/auc_se": judged["auc_se"]}


def read_rewards(source: Path, columns: tuple[str, str]) -> pa.Table:
    """Read pair_id and two columns of number lists from a parquet file or a folder of them."""
    paths = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    wanted = ["pair_id", *columns]
    try:
        tables = []
        for path in paths:
            with arrow_file(path) as file:
                tables.append(pq.read_table(file, columns=wanted))
        table = pa.concat_tables(tables).combine_chunks()
        lists = pa.list_(pa.float32())
        return table.cast(pa.schema([("pair_id", pa.int64()), *((name, lists) for name in columns)]))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"oracle.rewards: '{source}' cannot be read as parquet with pair_id and lists of numbers in "
            f"{' and '.join(columns)} ({one_line(error, 120)})"
        ) from None


def check_rewards_file(source: Path, columns: tuple[str, str]) -> str:
    """Raise a UserError unless the file has the columns without nulls; returns the digest of its content."""
    table = read_rewards(source, columns)
    for name in table.column_names:
        column = table.column(name)
        if column.null_count or (name != "pair_id" and pc.list_flatten(column).null_count):
            raise UserError(f"oracle.rewards: '{source}', column '{name}', holds nulls; expected a value in every row")
    return table_digest(table)


def score_pairs(pairs: Path, oracle_logps: Sequence[Path], reference_logps: Path | Sequence[Path], out: Path) -> Path:
    """Subtract stored log-probabilities into a scores table, shard by shard; rewards of several oracles are averaged.

    Args:
        reference_logps: one store for all oracles, or one for each.
    """
    bases = [reference_logps] * len(oracle_logps) if isinstance(reference_logps, Path) else list(reference_logps)
    kinds = ((pairs, "pairs"), *((store, "logps") for store in (*bases, *oracle_logps)))
    shards = list(zip(*(table_paths(folder, kind) for folder, kind in kinds), strict=True))
    clear_shards(out)
    made = []
    for index, (pair, *stores) in enumerate(shards):
        table = read_shard(pair, "pairs")
        before, after = stores[: len(bases)], stores[len(bases) :]
        scores = [
            pair_rewards(table, read_shard(oracle, "logps"), read_shard(base, "logps"))
            for base, oracle in zip(before, after, strict=True)
        ]
        made.append(write_shard(out, index, scores[0] if len(scores) == 1 else combine_scores(scores), len(shards)))
    try:
        require_rewards(read_shard(path, "scores") for path in made)
    except UserError:
        clear_shards(out)
        raise
    looked_at = made[:: math.ceil(len(made) / _LOOKED_AT)]
    _log_if_swapped(oracle_accuracy(read_shard(path, "scores") for path in looked_at))
    return out


def _log_if_swapped(accuracy: dict[str, float]) -> None:
    value, error = accuracy["oracle/accuracy"], accuracy["oracle/accuracy_se"]
    if value < 0.5 - 3 * error:
        log(
            f"  the oracle prefers the rejected response in {1 - value:.0%} of the pairs looked at: are oracle and "
            "reference swapped, or the labels?"
        )
