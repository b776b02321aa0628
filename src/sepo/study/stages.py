"""Stages of a comparison: the starting model's samples, and a training that is measured on its way."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from sepo.data.ragged import SIDES, flat
from sepo.data.splits import sample_prompts
from sepo.data.tables import read_table
from sepo.files import write_json
from sepo.forward.packing import read_length
from sepo.forward.scoring import table_pairs
from sepo.judging.in_run import judge_content
from sepo.judging.scorers import Scorer
from sepo.models.devices import choose_device, choose_dtype
from sepo.models.folders import is_adapter
from sepo.models.tokenizer import load_tokenizer
from sepo.recipe.objectives import OBJECTIVES
from sepo.recipe.settings import Recipe
from sepo.stages.stage import Model, Stage, StageResult
from sepo.study.kl_probe import PROBES, Passing, Probe
from sepo.study.policy_evaluator import Checkpoints, PolicyEvaluator, start_of
from sepo.training.batches import whole_responses
from sepo.training.checkpoints import STATE_FILE
from sepo.training.fit import objective_settings, train_model
from sepo.training.logs import carry_logs

POINTS, SAMPLES = "points.json", "start.json"


def training_types(recipe: Recipe, start: Model) -> dict[str, Any]:
    """`dtype` and `quantization` of the policy's weights in training, as keywords of `load_model`.

    The start is read in the same: a log-ratio between two types would measure their rounding.
    """
    policy = recipe.policy
    adapter = policy.lora is not None or is_adapter(Path(start.folder))
    dtype = choose_dtype("auto", choose_device(recipe.device), trained=not adapter)
    return {"dtype": str(dtype).removeprefix("torch."), "quantization": policy.quantization}


def prompts_to_answer(recipe: Recipe, held_out: pa.Table, choosing: int) -> list[list[int]]:
    """The prompts that are reported, or the `choosing` others on which a sweep is decided."""
    if choosing:
        return sample_prompts(held_out, choosing, after=recipe.eval.prompts)
    return sample_prompts(held_out, recipe.eval.prompts)


def start_stage(
    recipe: Recipe, start: Model, pairs: StageResult, seed: int, base: Callable[[], nn.Module], choosing: int = 0
) -> Stage:
    """Samples of the starting model, which every policy of that seed is paired with, in `start.json`.

    Args:
        base: gives `start` in memory, in the `training_types`.
        choosing: as for `prompts_to_answer`.
    """

    def work(folder: Path) -> dict[str, Any]:
        prompts = prompts_to_answer(recipe, read_table(pairs.folder / "held_out", "pairs"), choosing)
        samples = start_of(base(), load_tokenizer(start.folder), prompts, recipe.eval, seed)
        write_json(folder / SAMPLES, samples, indent=None)
        return {name: float(np.mean(values)) for name, values in samples.items() if name != "texts"}

    return Stage(
        kind="start",
        what=f"samples of the starting model, seed {seed}",
        depends={
            "start": start.inherited(),
            "pairs": pairs.content,
            "eval": recipe.eval.what_is_measured(),
            "seed": seed,
            **({"choosing": choosing} if choosing else {}),
            **training_types(recipe, start),
        },
        outputs=(SAMPLES,),
        work=work,
    )


def run_stage(
    recipe: Recipe,
    start: Model,
    targets: StageResult | None,
    logps: StageResult | None,
    pairs: StageResult,
    samples: StageResult,
    held_out_logps: StageResult | None,
    checkpoints: list[float],
    at_kl: list[float],
    seed: int,
    base: Callable[[], nn.Module],
    keep_model: bool = False,
    choosing: int = 0,
    scorer: Callable[[], Scorer | None] | None = None,
) -> Stage:
    """One setting at one seed: a policy trained, measured at `checkpoints` (shares of the run) into `points.json`.

    Where there is `at_kl`, it is also measured where it passes these KLs, and what it was seen by is in `probes.json`.

    Args:
        targets: a selection table; None trains on every response token of `pairs`.
        logps: of `start` over the pairs, for objectives with a reference.
        samples: from `start_stage`.
        held_out_logps: of `start`, where there is neither a gold reward nor a judge.
        base: gives `start` in memory, in the `training_types`.
        choosing: as for `prompts_to_answer`.
        scorer: as in `frontier.Judge`.
    """
    policy, chosen = recipe.policy, recipe.eval.judge

    def work(folder: Path) -> dict[str, Any]:
        if targets is None:
            table = read_table(pairs.folder / "train", "pairs")
        else:
            table = read_table(targets.folder, "selection")
            if not OBJECTIVES[policy.objective].reads_selection:
                table = whole_responses(table)
        held_out = read_table(pairs.folder / "held_out", "pairs")
        judge = PolicyEvaluator(
            base(),
            load_tokenizer(start.folder),
            prompts_to_answer(recipe, held_out, choosing),
            recipe.eval,
            seed,
            json.loads((samples.folder / SAMPLES).read_text(encoding="utf-8")),
            held_out,
            None if held_out_logps is None else read_table(held_out_logps.folder / "held_out", "logps"),
            recipe.tokens_per_row,
            scorer,
        )
        if not (folder / POINTS).exists() and not (folder / "policy" / "checkpoints").exists():
            # A finished policy, whose checkpoints can no longer be measured on the way.
            shutil.rmtree(folder / "policy", ignore_errors=True)
        passing = None
        if at_kl:
            probe = Probe(judge.base, judge.tokenizer, judge.prompts, recipe.eval, seed)
            passing = Passing(at_kl, probe, folder / PROBES)
        watch = Checkpoints(judge, checkpoints, folder / POINTS, len(table), passing)
        train_model(
            start.folder,
            table,
            folder / "policy",
            policy.training,
            reference_logps=None if logps is None else read_table(logps.folder, "logps"),
            lora=policy.lora,
            quantization=policy.quantization,
            seed=seed,
            device=recipe.device,
            callbacks=[watch],
            **objective_settings(policy),
        )
        if not keep_model:
            os.replace(folder / "policy" / STATE_FILE, folder / STATE_FILE)
            carry_logs(folder / "policy", folder)
            shutil.rmtree(folder / "policy")
        epochs = watch.points[-1]["pairs_seen"] / len(table)
        read = sum(read_length(pair) for pair in table_pairs(table))
        return {
            "target_tokens": round(epochs * target_tokens(table, policy.objective)),
            "read_tokens": round(epochs * read),
        }

    return Stage(
        kind="run",
        what=f"{policy.objective}, seed {seed}",
        depends={
            "policy": policy.what_is_trained(),
            "start": start.inherited(),
            "targets": pairs.content if targets is None else targets.content,
            "logps": None if logps is None else logps.content,
            "pairs": pairs.content,
            "samples": samples.content,
            "eval": recipe.eval.what_is_measured(),
            **({} if chosen is None else {"judge": judge_content(chosen)}),
            "checkpoints": checkpoints,
            **({"at_kl": at_kl} if at_kl else {}),
            "seed": seed,
            **({"choosing": choosing} if choosing else {}),
            **training_types(recipe, start),
        },
        outputs=(POINTS, PROBES) if at_kl else (POINTS,),
        work=work,
    )


def target_tokens(table: pa.Table, objective: str) -> int:
    """Tokens that a table trains on: key tokens of a selection, every response token, or those that can be matched."""
    column = "positions" if "chosen_positions" in table.column_names else "ids"
    numbers = [flat(table.column(f"{side}_{column}"))[1] for side in SIDES]
    if OBJECTIVES[objective].targets == "matched":
        return 2 * int(np.minimum(*numbers).sum())
    return sum(int(number.sum()) for number in numbers)
