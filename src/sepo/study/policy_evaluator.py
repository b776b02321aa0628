"""The reward-KL frontier: what a policy gains for how far it moves, measured several times while it is trained.

A method that reaches a higher reward may only have moved further from its start. So a run is a curve from (KL 0, no
gain) through its checkpoints, and methods are compared where their curves have the same KL.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from sepo.credit.rewards import response_sums
from sepo.data.prompts import words_of_prompt
from sepo.data.splits import prompt_numbers
from sepo.errors import UserError
from sepo.evaluate.accuracy import policy_accuracy
from sepo.evaluate.generate import Generation
from sepo.evaluate.gold import gold_reward
from sepo.evaluate.measure import decoded, sample, sample_kl
from sepo.evaluate.statistics import mean_and_se, paired_difference
from sepo.files import write_json
from sepo.forward.memory import PeakMemory
from sepo.forward.scoring import dataset_logps, read_like
from sepo.judging.in_run import judge_responses
from sepo.judging.scorers import Scorer
from sepo.processes import log
from sepo.recipe.settings import EvalSettings, JudgeSettings
from sepo.study.kl_probe import Passing
from sepo.training.batches import pairs_seen


class PolicyEvaluator:
    """Everything that measuring a policy needs and that does not change with the policy.

    Args:
        base: the model that policies start from, on its device, in the types of the policies in training.
        held_out: pairs that are not trained on; their first `settings.prompts` distinct prompts are answered.
        base_logps: stored log-probabilities of `held_out` under the base, for the accuracy without a gold reward; read
            again where they are missing or were read in other types or on another kind of device than the policy is.
        start: what `start_of` returned for the same base, prompts, settings and seed.
        tokens_per_row: token budget of a packed row when reading; a default for the device if None.
        scorer: gives the scorer of a judge in memory, None for one behind a server; made anew for each measurement if
            None.
    """

    def __init__(
        self,
        base: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[list[int]],
        settings: EvalSettings,
        seed: int,
        start: Mapping[str, list[Any]],
        held_out: pa.Table,
        base_logps: pa.Table | None = None,
        tokens_per_row: int | None = None,
        scorer: Callable[[], Scorer | None] | None = None,
    ):
        self.base, self.tokenizer, self.prompts, self.settings, self.seed = base, tokenizer, prompts, settings, seed
        self.start, self.held_out, self.base_logps = start, held_out, base_logps
        self.tokens_per_row, self.scorer = tokens_per_row, scorer

    def _read(self, model: nn.Module) -> pa.Table:
        return dataset_logps(model, self.held_out, tokens_per_row=self.tokens_per_row)

    def measure(self, policy: nn.Module) -> dict[str, Any]:
        """Sample from the policy and judge it against the start, on the same prompts and seed.

        Returns:
            kl, length, finished; with a gold reward gold, gold_difference and win_rate; with a judge judge_win_rate,
            and judge_failed, the answers without a verdict; with neither accuracy, the share of held-out pairs whose
            chosen response gained more. Each with its standard error by prompt (`_se`). And by_prompt, a list: what
            `quality` is the mean of, for each prompt (not with a judge that left answers without a verdict).

        Raises:
            UserError: the judge gave no verdict at all.
        """
        generations = sample(policy, self.tokenizer, self.prompts, self.settings, self.seed)
        groups = [one.prompt_index for one in generations]
        kl = sample_kl(policy, self.base, self.prompts, generations)
        lengths = np.array([len(one.response_ids) for one in generations])
        result: dict[str, Any] = {"finished": float(np.mean([one.finished for one in generations]))}
        result["kl"], result["kl_se"] = mean_and_se(kl, groups)
        result["length"], result["length_se"] = mean_and_se(lengths, groups)
        if self.settings.gold is not None:
            before = np.array(self.start["gold"])
            after = gold_of(generations, self.tokenizer, self.settings.gold)
            result["gold"], result["gold_se"] = mean_and_se(after, groups)
            result["gold_difference"], result["gold_difference_se"] = paired_difference(after, before, groups)
            result["by_prompt"] = prompt_means(after - before, groups)
            result["win_rate"], result["win_rate_se"] = mean_and_se(0.5 * (1 + np.sign(after - before)), groups)
        if self.settings.judge is not None:
            result.pop("by_prompt", None)  # of the gold reward, which is not what curves show then
            result |= self._judged(policy, generations, self.settings.judge)
        elif self.settings.gold is None:
            if self.base_logps is None or not read_like(self.base_logps, policy):
                self.base_logps = self._read(self.base)
            read = self._read(policy)
            metrics = policy_accuracy(self.base_logps, read, self.held_out)
            chosen, rejected = (
                after - before
                for after, before in zip(
                    response_sums(read, "logps"), response_sums(self.base_logps, "logps"), strict=True
                )
            )
            of_pairs = prompt_numbers(self.held_out.column("prompt_ids"))
            result["by_prompt"] = prompt_means(0.5 * np.sign(chosen - rejected), of_pairs)
            for name in ("accuracy", "accuracy_se", "accuracy_not_longer", "accuracy_not_longer_se"):
                result[name] = metrics[f"policy/{name}"]
        return result

    def _judged(self, policy: nn.Module, generations: Sequence[Generation], judge: JudgeSettings) -> dict[str, Any]:
        """What a judge says of the policy's answers against those of the start."""
        groups = [one.prompt_index for one in generations]
        found, columns, _ = judge_responses(
            judge,
            [words_of_prompt(self.prompts[one.prompt_index], self.tokenizer) for one in generations],
            self.start["texts"],
            decoded(self.tokenizer, generations),
            groups,
            str(next(policy.parameters()).device),
            None if self.scorer is None else self.scorer(),
        )
        if not found["judge/judged"]:
            raise UserError(f"the judge '{judge.name}' gave none of {len(generations)} answers a verdict")
        names = {"judge_win_rate": "win_rate", "judge_win_rate_se": "win_rate_se", "judge_failed": "failed"}
        result: dict[str, Any] = {name: found[f"judge/{source}"] for name, source in names.items()}
        if not found["judge/failed"]:
            result["by_prompt"] = prompt_means(np.asarray(columns["preference"]) - 1.5, groups)
        return result


def prompt_means(values: np.ndarray, prompts: Sequence[int] | np.ndarray) -> list[float]:
    """Mean of the values of each prompt, by the prompts' numbers; rounded, for files."""
    numbers, index = np.unique(np.asarray(prompts), return_inverse=True)
    return [round(float(one), 6) for one in np.bincount(index, values) / np.bincount(index, minlength=len(numbers))]


def start_of(
    base: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], settings: EvalSettings, seed: int
) -> dict[str, list[Any]]:
    """Sample from the starting model: `length` of each response, `gold` (with that reward), `texts` (with a judge)."""
    generations = sample(base, tokenizer, prompts, settings, seed)
    start: dict[str, list[Any]] = {"length": [float(len(one.response_ids)) for one in generations]}
    if settings.gold is not None:
        start["gold"] = gold_of(generations, tokenizer, settings.gold).tolist()
    if settings.judge is not None:
        start["texts"] = decoded(tokenizer, generations)
    return start


def gold_of(generations: Sequence[Generation], tokenizer: PreTrainedTokenizerBase, name: str) -> np.ndarray:
    """Gold reward of each response, `[responses]`."""
    return gold_reward(name).scores(decoded(tokenizer, generations))


class Checkpoints(TrainerCallback):
    """Measure the policy at given points of a run into a JSON file.

    A step that the file holds already is not measured again, so an interrupted run goes on with its curve.

    Args:
        shares: when to measure, as shares of the run's steps in (0, 1].
        path: the JSON file.
        pairs: pairs in one epoch.
        passing: measures where the policy passes given KLs, too; such a point also has `passed` and `probe`
            (`Passing.passed`).
    """

    def __init__(
        self, judge: PolicyEvaluator, shares: Sequence[float], path: Path, pairs: int, passing: Passing | None = None
    ):
        self.judge, self.shares, self.path, self.pairs, self.passing = judge, shares, path, pairs, passing
        self.points = _read_points(path)
        self.measuring = 0.0
        self.started = 0.0
        self.memory = PeakMemory()
        self.most: list[float] = []  # peak memory, in GB, of the parts of the training

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps = {max(1, round(state.max_steps * share)) for share in self.shares}
        done = [point["train_seconds"] for point in self.points if point["step"] <= state.global_step]
        self.started = time.monotonic() - max(done, default=0.0)
        self.measuring = 0.0
        self.most = [point["memory_gb"] for point in self.points if point.get("memory_gb")]
        self.memory.restart()
        if self.passing is not None:
            self.passing.begin(state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        looked = time.monotonic()
        passed = {} if self.passing is None else self.passing.passed(state.global_step, model, self.points)
        self.measuring += time.monotonic() - looked
        due = passed or state.global_step in self.steps
        if not due or any(point["step"] == state.global_step for point in self.points):
            return
        began = time.monotonic()
        trained = began - self.started - self.measuring
        if (held := self.memory.gb()) is not None:
            self.most.append(held)
        figures = {**passed, **self.judge.measure(model)}
        self.memory.restart()
        took = time.monotonic() - began
        self.measuring += took
        batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        seen = pairs_seen(state.global_step, self.pairs, batch)
        spent = {"train_seconds": round(trained, 2), "measure_seconds": round(took, 2)}
        spent |= {"memory_gb": max(self.most)} if self.most else {}
        self.points.append({"step": state.global_step, "pairs_seen": seen, **spent, **figures})
        self.points.sort(key=lambda point: point["step"])
        write_json(self.path, self.points, indent=1)

    def on_train_end(self, args, state, control, **kwargs):
        if self.passing is None or not self.points:  # none: it was interrupted before the first
            return
        furthest = max(point["kl"] for point in self.points)
        missed = [f"{target:g}" for target in self.passing.targets if target > furthest]
        if missed and state.global_step >= state.max_steps:
            log(f"  KL {', '.join(missed)} was not reached: the run got to {max(furthest, 0.0):.2f}")


def _read_points(path: Path) -> list[dict[str, Any]]:
    """What an interrupted run measured; nothing if that is no list of points."""
    try:
        points = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    whole = isinstance(points, list) and all(isinstance(point, dict) and "step" in point for point in points)
    return points if whole else []


def quality(point: Mapping[str, Any]) -> float:
    """What a point gained over the start: the judge's win rate above one half, else the mean gold difference, else the
    accuracy above one half.
    """
    if "judge_win_rate" in point:
        return point["judge_win_rate"] - 0.5
    return point["gold_difference"] if "gold_difference" in point else point["accuracy"] - 0.5


def at_kl(points: Sequence[Mapping[str, Any]], kl: float | None) -> tuple[float, bool]:
    """Quality of a run at a KL, read off the lines through (0, 0) and its checkpoints, straight in the root of the KL.

    A gold reward grows about as the root of the KL (Gao et al. 2022, arXiv 2210.10760, before it over-optimises), so
    lines that are straight in the KL itself would read too little wherever a run has no checkpoint near: of the methods
    that move fast.

    Args:
        points: checkpoints with `kl` and what `quality` reads; a KL estimated below 0 counts as 0.
        kl: where to read; None for the end of the run.

    Returns:
        the quality, and whether the run got that far. One that did not counts with its furthest point: at less KL
        than was allowed.

    >>> at_kl([{"kl": 1.0, "gold_difference": 0.2}, {"kl": 4.0, "gold_difference": 0.3}], 2.25)
    (0.25, True)
    >>> at_kl([{"kl": 1.0, "gold_difference": 0.2}], 2.0)
    (0.2, False)
    """
    if kl is None:
        return quality(points[-1]), True
    curve = sorted([(0.0, 0.0), *((max(point["kl"], 0.0), quality(point)) for point in points)])
    at, gained = zip(*curve, strict=True)
    return float(np.interp(np.sqrt(kl), np.sqrt(at), gained)), at[-1] >= kl


def at_kl_by_prompt(points: Sequence[Mapping[str, Any]], kl: float | None) -> np.ndarray | None:
    """What `at_kl` reads, for each prompt: the same weights of the same checkpoints, `[prompts]`.

    None where a checkpoint was measured without it, by an earlier release.
    """
    if not all("by_prompt" in point for point in points):
        return None
    if kl is None:
        return np.array(points[-1]["by_prompt"])
    curve = sorted(points, key=lambda point: (max(point["kl"], 0.0), quality(point)))
    gained = np.array([np.zeros(len(curve[0]["by_prompt"])), *(point["by_prompt"] for point in curve)])
    at = np.sqrt([0.0, *(max(point["kl"], 0.0) for point in curve)])
    weights = [np.interp(np.sqrt(kl), at, one) for one in np.eye(len(at))]
    return np.array(weights) @ gained


def before_first_checkpoint(points: Sequence[Mapping[str, Any]], kl: float | None) -> bool:
    """Whether a KL lies below that of every checkpoint of a run: `at_kl` then rests on the shape of the curve alone."""
    return kl is not None and kl < min(point["kl"] for point in points)
