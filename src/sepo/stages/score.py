"""Stage "score": the reward of every response token, and how far the oracle's labels can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sepo import processes
from sepo.credit.rewards import combine_scores, require_rewards, token_rewards
from sepo.data.tables import clear_shards, read_shard, read_table, table_paths, write_shard
from sepo.errors import UserError
from sepo.evaluate.accuracy import oracle_accuracy
from sepo.evaluate.fidelity import fidelity
from sepo.processes import say
from sepo.recipe.settings import Recipe
from sepo.stages.logps import PARTS, part_of
from sepo.stages.stage import SCORES, SCORES_HELD_OUT, Cost, Made, Sizes, Stage

_TABLES = {"train": SCORES, "held_out": SCORES_HELD_OUT}


def stage(
    pairs: Made, oracle_logps: Sequence[Made], reference_logps: Made, words: PreTrainedTokenizerBase | None = None
) -> Stage:
    """Token rewards of all pairs, the mean over oracles, in `scores` and `scores_held_out`.

    Args:
        words: a tokenizer, to judge the rewards by the words of VADER's lexicon as well.
    """

    def work(folder: Path) -> dict[str, Any]:
        for part in PARTS:
            oracles = [part_of(logps.folder, part) for logps in oracle_logps]
            score_pairs(pairs.folder / part, oracles, part_of(reference_logps.folder, part), folder / _TABLES[part])
        held_out = read_table(folder / SCORES_HELD_OUT, "scores")
        results: dict[str, Any] = oracle_accuracy(held_out) if len(held_out) else {}
        if words is not None:
            judged = fidelity(words, read_table(folder / SCORES, "scores"))
            results |= {"fidelity/auc": judged["auc"], "fidelity/auc_se": judged["auc_se"]}
        return results

    return Stage(
        kind="score",
        what="token rewards" + (f", the mean of {len(oracle_logps)} oracles" if len(oracle_logps) > 1 else ""),
        depends={
            "oracle": [logps.content for logps in oracle_logps],
            "reference": reference_logps.content,
            "pairs": pairs.content,
            "words": words is not None,
        },
        outputs=(SCORES, SCORES_HELD_OUT),
        work=lambda folder: processes.on_main(lambda: work(folder)),
    )


def score_pairs(pairs: Path, oracle_logps: Sequence[Path], reference_logps: Path, out: Path) -> Path:
    """Join stored log-probabilities into a scores table, shard by shard; several oracles' rewards are averaged."""
    kinds = ((pairs, "pairs"), (reference_logps, "logps"), *((store, "logps") for store in oracle_logps))
    shards = list(zip(*(table_paths(folder, kind) for folder, kind in kinds), strict=True))
    clear_shards(out)
    made = []
    for index, (pair, reference, *oracles) in enumerate(shards):
        table, base = read_shard(pair, "pairs"), read_shard(reference, "logps")
        scores = [token_rewards(table, read_shard(oracle, "logps"), base) for oracle in oracles]
        made.append(write_shard(out, index, scores[0] if len(scores) == 1 else combine_scores(scores), len(shards)))
    try:
        require_rewards(read_shard(path, "scores") for path in made)
    except UserError:
        clear_shards(out)
        raise
    _say_if_swapped(oracle_accuracy(read_table(out, "scores")))
    return out


def _say_if_swapped(accuracy: dict[str, float]) -> None:
    value, error = accuracy["oracle/accuracy"], accuracy["oracle/accuracy_se"]
    if value < 0.5 - 3 * error:
        say(
            f"  the oracle prefers the rejected response in {1 - value:.0%} of these pairs: are oracle and reference "
            "swapped, or the labels?"
        )


def cost(recipe: Recipe, sizes: Sizes) -> Cost:
    """Differences of what the passes stored: seconds at most."""
    return Cost("token rewards", sizes.train.pairs + sizes.held_out.pairs, sizes.train.tokens + sizes.held_out.tokens)
