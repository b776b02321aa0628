"""What predicts a policy's gain before it is trained? Measures of oracles beside what their policies gained.

A grid trains one policy for each of many oracles of very different quality, by one rule. Each oracle is measured on
held-out pairs without any policy; the rank correlation over oracles and seeds with the gain at one KL tells which
measure is worth ranking oracles by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sepo.bench.credit.grids import grid_of
from sepo.bench.credit.localise import localise
from sepo.credit.rewards import response_sums
from sepo.data.ragged import SIGNED_SIDES, flat
from sepo.data.tables import read_table
from sepo.evaluate.fidelity import token_truth
from sepo.evaluate.gold import gold_reward
from sepo.models.tokenizer import load_tokenizer
from sepo.report.statistics import rank_correlation
from sepo.runs.folder import open_run
from sepo.stages.stage import SCORES, SCORES_HELD_OUT
from sepo.study.comparison import Passes, compare, method_of
from sepo.study.curves import at_kl

# Oracles of very different quality: settings of section `oracle` on top of the task's.
ORACLES: dict[str, dict[str, Any]] = {
    "tenth": {"sample": 0.1},
    "quarter": {"sample": 0.25},
    "half": {"sample": 0.5},
    "whole": {},
    "gentle": {"beta": 0.5},
    "bold": {"beta": 0.02},
    "smooth": {"label_smoothing": 0.1},
    "longer": {"training.num_train_epochs": 6},
    "slower": {"training.learning_rate": 1e-4},
    "three": {"count": 3},
    "contrastive": {"contrastive": True},
}
PREDICTORS = ("accuracy", "margin", "auc", "auc_held_out", "precision_held_out", "share_on_truth")


def predictors(tokenizer: Any, scores: pa.Table, held_out: pa.Table, gold: str) -> dict[str, float]:
    """Measures of an oracle by its token rewards on training and on held-out pairs; no policy is needed.

    Returns:
        accuracy and margin (mean over its standard deviation) on held-out pairs; AUC on training and held-out pairs and
        average precision on held-out pairs, for the tokens that count; share of |s| on those tokens, held out, over
        their share of all tokens.
    """
    truth = gold_reward(gold).truth
    chosen, rejected = response_sums(held_out, "rewards")
    margins = chosen - rejected
    on_held_out = localise(tokenizer, held_out, truth)["oracle"]
    mass = []
    for side, _ in SIGNED_SIDES:
        size = np.abs(flat(held_out.column(f"{side}_rewards"))[0].astype(np.float64))
        counts = np.nan_to_num(token_truth(tokenizer, held_out, side, truth)) != 0
        mass.append(size[counts].sum() / size.sum() / counts.mean())
    return {
        "accuracy": float(np.mean((margins > 0) + 0.5 * (margins == 0))),
        "margin": float(margins.mean() / margins.std()),
        "auc": localise(tokenizer, scores, truth)["oracle"].auc,
        "auc_held_out": on_held_out.auc,
        "precision_held_out": on_held_out.precision,
        "share_on_truth": float(np.mean(mass)),
    }


def study_oracles(
    task: str, out: Path, seeds: Sequence[int], rule: Mapping[str, Any], oracles: Sequence[str] = tuple(ORACLES)
) -> dict[str, Any]:
    """Train a policy by `rule` for each oracle at each seed; returns their predictors, gains and rank correlations."""
    variants = {name: {**rule, "oracle": ORACLES[name]} for name in oracles}
    grid, settings = grid_of(task, out, variants, seeds)
    result = compare(grid, settings)
    gains = {(run["variant"], run["seed"]): at_kl(run["points"], grid.kl)[0] for run in result["runs"]}
    rows = []
    with open_run(next(iter(settings.values()))[0].recipe) as run:
        passes = Passes(run)
        for (name, seed), gain in gains.items():
            recipe = settings[name][0].recipe
            folder = method_of(recipe, passes, grid, seed).scores.folder
            scores, held_out = (read_table(folder / part, "scores") for part in (SCORES, SCORES_HELD_OUT))
            tokenizer = load_tokenizer(recipe.reference.model)
            found = predictors(tokenizer, scores, held_out, str(recipe.eval.gold))
            rows.append({"oracle": name, "seed": seed, "gain": gain} | found)
    columns = {name: [row[name] for row in rows] for name in PREDICTORS}
    ranks = {name: rank_correlation(values, [row["gain"] for row in rows]) for name, values in columns.items()}
    return {"task": task, "kl": grid.kl, "rule": dict(rule), "rows": rows, "rank_correlation": ranks}
