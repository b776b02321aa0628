"""Stages of a comparison: the starting model's samples, and a training that is measured on its way."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from sepo.data.ragged import SIDES, flat
from sepo.data.splits import prompt_rows
from sepo.data.tables import read_table
from sepo.files import write_json
from sepo.forward.packing import read_length
from sepo.forward.scoring import table_pairs
from sepo.judging.in_run import judge_content
from sepo.judging.scorers import Scorer
from sepo.models.devices import choose_device
from sepo.models.tokenizer import load_tokenizer
from sepo.recipe.objectives import OBJECTIVES
from sepo.recipe.settings import Recipe
from sepo.stages.stage import Model, Stage, StageResult
from sepo.study.grid import Grid
from sepo.study.passing import Passing
from sepo.study.policy_evaluator import Checkpoints, PolicyEvaluator, start_of
from sepo.targets.kl_probe import PROBES, Probe
from sepo.training import fit
from sepo.training.batches import whole_responses
from sepo.training.checkpoints import STATE_FILE
from sepo.training.fit import objective_settings, train_model
from sepo.training.logs import carry_logs

POINTS, SAMPLES = "points.json", "start.json"


def training_types(recipe: Recipe, start: Model) -> dict[str, Any]:
    """`dtype` and `quantization` of the policy's weights in training, as keywords of `load_model`.

    The start is read in the same: a log-ratio between two types would measure their rounding.
    """
    types = fit.training_types(recipe.policy, start.folder, choose_device(recipe.device).type)
    return {"dtype": types.dtype, "quantization": types.quantization}


@dataclass(frozen=True)
class Measured:
    """How the runs of a comparison are measured.

    Attributes:
        grid: the comparison: when to measure, and whether to keep the policies.
        seed: of training and samples.
        choosing: number of prompts on which a sweep is decided, apart from the reported ones; 0: the reported prompts.
        base: gives the starting model in memory, in the `training_types`.
        scorer: as in `PolicyEvaluator`.
    """

    grid: Grid
    seed: int
    choosing: int
    base: Callable[[], nn.Module]
    scorer: Callable[[], Scorer | None] | None = None


def rows_to_answer(recipe: Recipe, held_out: pa.Table, choosing: int) -> pa.Table:
    """A row of each prompt that is reported, or of the `choosing` others on which a sweep is decided."""
    if choosing:
        return prompt_rows(held_out, choosing, after=recipe.eval.prompts)
    return prompt_rows(held_out, recipe.eval.prompts)


def start_stage(recipe: Recipe, start: Model, pairs: StageResult, measured: Measured) -> Stage:
    """Samples of the starting model, which every policy of that seed is paired with, in `start.json`."""
    seed, choosing = measured.seed, measured.choosing

    def run(folder: Path) -> dict[str, Any]:
        asked = rows_to_answer(recipe, read_table(pairs.folder / "held_out", "pairs"), choosing)
        samples = start_of(measured.base(), load_tokenizer(start.folder), asked, recipe.eval, seed)
        write_json(folder / SAMPLES, samples, indent=None)
        return {name: float(np.mean(values)) for name, values in samples.items() if name != "texts"}

    return Stage(
        kind="start",
        what=f"samples of the starting model, seed {seed}",
        depends={
            "start": start.inherited(),
            "pairs": pairs.content,
            "eval": recipe.eval.cache_key(),
            "seed": seed,
            "choosing": choosing,
            **training_types(recipe, start),
        },
        outputs=(SAMPLES,),
        run=run,
        facts={"recipe": recipe},
    )


def run_stage(
    recipe: Recipe,
    start: Model,
    targets: StageResult | None,
    logps: StageResult | None,
    pairs: StageResult,
    samples: StageResult,
    held_out_logps: StageResult | None,
    measured: Measured,
) -> Stage:
    """One setting at one seed: a policy is trained, and measured on its way into `points.json`.

    Where the grid measures at KLs, `probes.json` holds the KL estimates by which they were found.

    Args:
        targets: a selection table; None trains on every response token of `pairs`.
        logps: log-probabilities under `start`, for objectives with a reference.
        samples: result of `start_stage`.
        held_out_logps: log-probabilities under `start`, if there is neither a gold reward nor a judge.
    """
    policy, chosen, grid, seed = recipe.policy, recipe.eval.judge, measured.grid, measured.seed
    at_kl, choosing = grid.checkpoints_at_kl, measured.choosing

    def run(folder: Path) -> dict[str, Any]:
        if targets is None:
            table = read_table(pairs.folder / "train", "pairs")
        else:
            table = read_table(targets.folder, "selection")
            if not OBJECTIVES[policy.objective].reads_selection:
                table = whole_responses(table)
        evaluator = evaluator_of(recipe, start, pairs, samples, held_out_logps, measured)
        reference_logps = None if logps is None else read_table(logps.folder, "logps")
        return _train_measured(recipe, start, table, reference_logps, evaluator, measured, folder)

    return Stage(
        kind="run",
        what=f"{policy.objective}, seed {seed}",
        depends={
            "policy": policy.model_dump(mode="json", exclude={"target_kl"}),  # compare refuses it
            "start": start.inherited(),
            "targets": pairs.content if targets is None else targets.content,
            "logps": None if logps is None else logps.content,
            "pairs": pairs.content,
            "samples": samples.content,
            "eval": recipe.eval.cache_key(),
            **({} if chosen is None else {"judge": lambda: judge_content(chosen)}),
            "checkpoints": grid.shares,
            "at_kl": at_kl,
            "seed": seed,
            "choosing": choosing,
            **training_types(recipe, start),
        },
        outputs=(POINTS, PROBES) if at_kl else (POINTS,),
        run=run,
        facts={"recipe": recipe, "measurements": grid.measurements},
    )


def evaluator_of(
    recipe: Recipe,
    start: Model,
    pairs: StageResult,
    samples: StageResult,
    held_out_logps: StageResult | None,
    measured: Measured,
) -> PolicyEvaluator:
    """What measures a policy on its way; arguments as in `run_stage`."""
    held_out = read_table(pairs.folder / "held_out", "pairs")
    asked = rows_to_answer(recipe, held_out, measured.choosing)
    return PolicyEvaluator(
        measured.base(),
        load_tokenizer(start.folder),
        asked,
        recipe.eval,
        measured.seed,
        json.loads((samples.folder / SAMPLES).read_text(encoding="utf-8")),
        held_out,
        None if held_out_logps is None else read_table(held_out_logps.folder / "held_out", "logps"),
        recipe.tokens_per_row,
        measured.scorer,
    )


def _train_measured(
    recipe: Recipe,
    start: Model,
    table: pa.Table,
    reference_logps: pa.Table | None,
    evaluator: PolicyEvaluator,
    measured: Measured,
    folder: Path,
) -> dict[str, Any]:
    """Train a policy and measure it on its way; returns the tokens that it read and trained on."""
    policy, grid = recipe.policy, measured.grid
    if not (folder / POINTS).exists() and not (folder / "policy" / "checkpoints").exists():
        # A finished policy cannot be measured on its way any more.
        shutil.rmtree(folder / "policy", ignore_errors=True)
    passing = None
    if grid.checkpoints_at_kl:
        probe = Probe(evaluator.base, evaluator.tokenizer, evaluator.prompts, recipe.eval, measured.seed)
        passing = Passing(grid.checkpoints_at_kl, probe, folder / PROBES)
    watch = Checkpoints(evaluator, grid.shares, folder / POINTS, len(table), passing)
    train_model(
        start.folder,
        table,
        folder / "policy",
        policy.training,
        reference_logps=reference_logps,
        lora=policy.lora,
        quantization=policy.quantization,
        seed=measured.seed,
        device=recipe.device,
        callbacks=[watch],
        **objective_settings(policy),
    )
    if not grid.keep_models:
        os.replace(folder / "policy" / STATE_FILE, folder / STATE_FILE)
        carry_logs(folder / "policy", folder)
        shutil.rmtree(folder / "policy")
    passes = watch.points[-1]["pairs_seen"] / len(table)
    read = sum(read_length(pair) for pair in table_pairs(table))
    return {
        "target_tokens": round(passes * target_tokens(table, policy.objective)),
        "read_tokens": round(passes * read),
    }


def target_tokens(table: pa.Table, objective: str) -> int:
    """Tokens that a table trains on: key tokens of a selection, every response token, or those that can be matched."""
    column = "positions" if "chosen_positions" in table.column_names else "ids"
    numbers = [flat(table.column(f"{side}_{column}"))[1] for side in SIDES]
    if OBJECTIVES[objective].targets == "matched":
        return 2 * int(np.minimum(*numbers).sum())
    return sum(int(number.sum()) for number in numbers)
