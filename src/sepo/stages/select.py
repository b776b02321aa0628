"""Stage "select": the key tokens of every response."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sepo import processes
from sepo.credit.rewards import require_rewards
from sepo.credit.selection import check_rule, dataset_thresholds, select_key_tokens, select_settings
from sepo.data.ragged import SIDES, flat
from sepo.data.tables import PAIR_WEIGHT, clear_shards, iter_tables, read_shard, table_paths, write_shard
from sepo.errors import UserError
from sepo.recipe.objectives import OBJECTIVES
from sepo.recipe.settings import Recipe, SelectSettings
from sepo.stages.stage import SCORES, Stage, StageResult


def check(recipe: Recipe) -> None:
    """Check the rule and its settings."""
    check_rule(recipe.select)
    if recipe.select.credit == "truth" and recipe.eval.gold is None:
        raise UserError("select.credit truth needs eval.gold, the gold reward that says which tokens count")
    if recipe.select.credit == "truth" and OBJECTIVES[recipe.policy.objective].reads_token_rewards:
        raise UserError(f"{recipe.policy.objective} reads token rewards: select.credit truth has none, choose another")


def settings_of(recipe: Recipe) -> SelectSettings:
    """The selection of a recipe. For objectives that read the reward of every token: all tokens, with their rewards."""
    if not OBJECTIVES[recipe.policy.objective].reads_token_rewards:
        return recipe.select
    confidence = recipe.select.confidence
    return SelectSettings(k_chosen=1, k_rejected=1, include_end=True, credit="reward", confidence=confidence)


def stage(recipe: Recipe, scores: StageResult, seed: int) -> Stage:
    """The key tokens of a score table. Only rule "random" depends on the seed."""
    settings = settings_of(recipe)
    rule = settings.model_dump(mode="json")
    rules = rule["rule_chosen"], rule["rule_rejected"]

    def write(folder: Path) -> dict[str, Any]:
        found = select(scores.folder / SCORES, folder, **rule, seed=seed)
        counts, weights = selected(iter_tables(found, "selection"))
        return {"key_tokens": sum(counts[f"{side}/key_tokens"] for side in SIDES), **weights}

    return Stage(
        kind="select",
        what=f"{rules[0]} {settings.k_chosen:g} / {rules[1]} {settings.k_rejected:g}, {settings.credit} credit"
        + (", pairs by confidence" if settings.confidence else ""),
        depends={"scores": scores.content, "select": rule, "seed": seed if "random" in rules else None},
        outputs=(".",),
        run=lambda folder: processes.on_main(lambda: write(folder)),
        facts={"recipe": recipe},
    )


def select(
    scores: Path, out: Path, k_chosen: float = 0.3, k_rejected: float = 0.3, *, seed: int = 0, **keywords: Any
) -> Path:
    """Write the key tokens of a score table, shard by shard; keywords as in `select_key_tokens`."""
    settings = select_settings(k_chosen=k_chosen, k_rejected=k_rejected, **keywords)
    check_rule(settings)
    paths = table_paths(scores, "scores")
    for path in paths:
        if path.parent.resolve() == out.resolve():
            raise UserError(f"'{out}' holds the score table itself: choose another folder for the selection")
    # Check every shard before the old selection is deleted.
    if not sum(len(read_shard(path, "scores")) for path in paths):
        raise UserError(f"'{scores}' holds no pair: expected a score table with at least one row")
    require_rewards(read_shard(path, "scores") for path in paths)
    statistics = None
    if settings.label_log_odds:
        from sepo.credit.label_log_odds import label_statistics

        statistics = label_statistics(read_shard(path, "scores") for path in paths)
    # A rule over the whole dataset becomes a threshold for each shard.
    settings = dataset_thresholds((read_shard(path, "scores") for path in paths), settings, statistics)
    clear_shards(out)
    weighs = False
    for index, path in enumerate(paths):
        table = select_key_tokens(read_shard(path, "scores"), settings=settings, statistics=statistics, seed=seed)
        weighs |= PAIR_WEIGHT not in table.column_names or bool(table.column(PAIR_WEIGHT).to_numpy().any())
        write_shard(out, index, table, len(paths))
    if not weighs:
        clear_shards(out)
        raise UserError("every pair has weight 0: the oracle ranks none as it is labelled; leave confidence at 0")
    return out


def selected(tables: Iterable[pa.Table]) -> tuple[dict[str, int], dict[str, float]]:
    """What a selection kept, from its shards.

    Returns:
        `pairs`, and for each side `chosen/tokens` and `chosen/key_tokens`; and, with `confidence`, how many pairs have
        weight 0 and the mean weight.
    """
    counts = {"pairs": 0, **{f"{side}/{part}": 0 for side in SIDES for part in ("tokens", "key_tokens")}}
    weights: list[np.ndarray] = []
    for table in tables:
        counts["pairs"] += len(table)
        for side in SIDES:
            counts[f"{side}/tokens"] += int(flat(table.column(f"{side}_ids"))[1].sum())
            counts[f"{side}/key_tokens"] += int(flat(table.column(f"{side}_positions"))[1].sum())
        if PAIR_WEIGHT in table.column_names:
            weights.append(table.column(PAIR_WEIGHT).to_numpy())
    if not weights:
        return counts, {}
    values = np.concatenate(weights)
    return counts, {"pairs_left_out": int((values == 0).sum()), "mean_pair_weight": float(values.mean())}
