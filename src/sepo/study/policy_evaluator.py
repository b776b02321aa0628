"""Measure a policy during training: its gain and its KL from the start at several checkpoints.

`PolicyEvaluator` measures one policy; the callback `Checkpoints` calls it during training. `curves.py` reads the
checkpoints as a reward-KL curve.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from sepo.credit.rewards import response_sums
from sepo.data.conversation import conversations_of
from sepo.data.splits import prompt_numbers
from sepo.errors import UserError
from sepo.evaluate.accuracy import policy_accuracy
from sepo.evaluate.generate import Generation
from sepo.evaluate.gold import gold_reward
from sepo.evaluate.measure import answers_of, decoded, own_logps, questions_of, response_logps, sample
from sepo.evaluate.statistics import mean_and_se, paired_difference
from sepo.files import write_json
from sepo.forward.memory import PeakMemory
from sepo.forward.scoring import dataset_logps, read_like
from sepo.judging.in_run import judge_responses
from sepo.judging.scorers import Scorer
from sepo.processes import log
from sepo.recipe.settings import EvalSettings, JudgeSettings
from sepo.study.passing import Passing
from sepo.targets.kl_probe import read_points
from sepo.training.batches import pairs_seen


@dataclass
class PolicyEvaluator:
    """Measures policies that start from one base on the same prompts.

    Attributes:
        base: the start, on its device, in the types of the policies in training.
        asked: a pair for each prompt that policies answer.
        held_out: pairs that are not trained on.
        base_logps: stored log-probabilities of `held_out` under the base, for the accuracy without a gold reward.
            Computed again if they are missing, or come from other types or another kind of device than the policy's.
        start: from `start_of` for the same base, prompts, settings and seed.
        tokens_per_row: token budget of a packed row when scoring; a default for the device if None.
        scorer: returns the scorer of a judge in memory, or None for a judge behind a server. Without it, every
            measurement loads the judge again.
    """

    base: nn.Module
    tokenizer: PreTrainedTokenizerBase
    asked: pa.Table
    settings: EvalSettings
    seed: int
    start: Mapping[str, list[Any]]
    held_out: pa.Table
    base_logps: pa.Table | None = None
    tokens_per_row: int | None = None
    scorer: Callable[[], Scorer | None] | None = None

    def __post_init__(self) -> None:
        self.prompts = self.asked.column("prompt_ids").to_pylist()

    def _logps(self, model: nn.Module) -> pa.Table:
        return dataset_logps(model, self.held_out, tokens_per_row=self.tokens_per_row)

    def measure(self, policy: nn.Module) -> dict[str, Any]:
        """Sample answers from the policy and compare them with the start's, on the same prompts and seed.

        Returns:
            the values of `of_answers`; without gold reward and judge also accuracy, the share of held-out pairs whose
            chosen response gained more, with its standard error by prompt, and by_prompt of it.

        Raises:
            UserError: the judge gave no verdict at all.
        """
        generations = sample(policy, self.tokenizer, self.prompts, self.settings, self.seed)
        kl = sample_kl(policy, self.base, self.prompts, generations)
        result = self.of_answers(generations, kl, str(next(policy.parameters()).device))
        if self.settings.gold is None and self.settings.judge is None:
            result |= self._accuracy(policy)
        return result

    def of_answers(self, generations: Sequence[Generation], kl: np.ndarray, device: str) -> dict[str, Any]:
        """Compare answers to all prompts with the start's.

        Args:
            generations: as many to each prompt as the start gave, by prompt.
            kl: `[answers]` nats, whose mean is the KL from the start.
            device: of a judge that is loaded for this.

        Returns:
            kl, length, finished; with a gold reward gold, gold_difference and win_rate; with a judge judge_win_rate,
            and judge_failed, the answers without a verdict. Each with its standard error by prompt (`_se`). And
            by_prompt, the list of each prompt's gain, whose mean is `curves.quality` (missing if a judge left answers
            without a verdict, or without gold reward and judge).

        Raises:
            UserError: the judge gave no verdict at all.
        """
        groups = [generation.prompt_index for generation in generations]
        lengths = np.array([len(generation.response_ids) for generation in generations])
        result: dict[str, Any] = {"finished": float(np.mean([generation.finished for generation in generations]))}
        result["kl"], result["kl_se"] = mean_and_se(kl, groups)
        result["length"], result["length_se"] = mean_and_se(lengths, groups)
        if self.settings.gold is not None:
            before = np.array(self.start["gold"])
            after = gold_of(generations, self.tokenizer, self.settings.gold, self.asked)
            result["gold"], result["gold_se"] = mean_and_se(after, groups)
            result["gold_difference"], result["gold_difference_se"] = paired_difference(after, before, groups)
            result["by_prompt"] = prompt_means(after - before, groups)
            result["win_rate"], result["win_rate_se"] = mean_and_se(0.5 * (1 + np.sign(after - before)), groups)
        if self.settings.judge is not None:
            result.pop("by_prompt", None)  # of the gold reward; with a judge, curves show the judge's win rate
            result |= self._judged(generations, self.settings.judge, device)
        return result

    def _accuracy(self, policy: nn.Module) -> dict[str, Any]:
        """Share of held-out pairs whose chosen response gained more log-probability than the rejected one."""
        if self.base_logps is None or not read_like(self.base_logps, policy):
            self.base_logps = self._logps(self.base)
        policy_logps = self._logps(policy)
        metrics = policy_accuracy(self.base_logps, policy_logps, self.held_out)
        chosen, rejected = (
            after - before
            for after, before in zip(
                response_sums(policy_logps, "logps"), response_sums(self.base_logps, "logps"), strict=True
            )
        )
        prompts = prompt_numbers(self.held_out)
        names = ("accuracy", "accuracy_se", "accuracy_not_longer", "accuracy_not_longer_se")
        return {
            "by_prompt": prompt_means(0.5 * np.sign(chosen - rejected), prompts),
            **{name: metrics[f"policy/{name}"] for name in names},
        }

    def _judged(self, generations: Sequence[Generation], judge: JudgeSettings, device: str) -> dict[str, Any]:
        """The judge's win rate of answers against the start's."""
        groups = [generation.prompt_index for generation in generations]
        conversations = conversations_of(self.asked)
        metrics, columns, _ = judge_responses(
            judge,
            [conversations[group] for group in groups],
            self.start["texts"],
            answers_of(self.tokenizer, generations, self.prompts),
            groups,
            device,
            None if self.scorer is None else self.scorer(),
        )
        if not metrics["judge/judged"]:
            raise UserError(f"the judge '{judge.name}' gave none of {len(generations)} answers a verdict")
        names = {"judge_win_rate": "win_rate", "judge_win_rate_se": "win_rate_se", "judge_failed": "failed"}
        result: dict[str, Any] = {name: metrics[f"judge/{source}"] for name, source in names.items()}
        if not metrics["judge/failed"]:
            result["by_prompt"] = prompt_means(np.asarray(columns["preference"]) - 1.5, groups)
        return result


def prompt_means(values: np.ndarray, prompts: Sequence[int] | np.ndarray) -> list[float]:
    """Mean value of each prompt, in the order of prompt numbers, rounded for files."""
    numbers, index = np.unique(np.asarray(prompts), return_inverse=True)
    means = np.bincount(index, values) / np.bincount(index, minlength=len(numbers))
    return [round(float(mean), 6) for mean in means]


def start_of(
    base: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asked: pa.Table,
    settings: EvalSettings,
    seed: int,
) -> dict[str, list[Any]]:
    """Sample from the start: `length` of each response, `gold` (with a gold reward) and `texts` (with a judge)."""
    generations = sample(base, tokenizer, asked.column("prompt_ids").to_pylist(), settings, seed)
    start: dict[str, list[Any]] = {"length": [float(len(generation.response_ids)) for generation in generations]}
    if settings.gold is not None:
        start["gold"] = gold_of(generations, tokenizer, settings.gold, asked).tolist()
    if settings.judge is not None:
        start["texts"] = answers_of(tokenizer, generations, asked.column("prompt_ids").to_pylist())
    return start


def gold_of(
    generations: Sequence[Generation],
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    asked: pa.Table,
) -> np.ndarray:
    """Gold reward of each response, `[responses]`; `asked` has a row for each prompt."""
    questions = questions_of(asked, tokenizer)
    of_response = [questions[generation.prompt_index] for generation in generations]
    return gold_reward(name).scores(of_response, decoded(tokenizer, generations))


class Checkpoints(TrainerCallback):
    """Measures the policy at given points of its training and writes the results to a JSON file.

    Steps that the file has already are not measured again, so a resumed run continues its curve.

    Args:
        shares: when to measure, as shares of the run's steps in (0, 1].
        path: the JSON file.
        pairs: pairs in one epoch.
        passing: measures also where the policy passes given KLs; such points have `passed` and `probe` too
            (`Passing.passed`).
    """

    def __init__(
        self,
        evaluator: PolicyEvaluator,
        shares: Sequence[float],
        path: Path,
        pairs: int,
        passing: Passing | None = None,
    ):
        self.evaluator, self.shares, self.path, self.pairs, self.passing = evaluator, shares, path, pairs, passing
        self.points = read_points(path)
        self.measuring = 0.0
        self.started = 0.0
        self.memory = PeakMemory()
        self.peaks: list[float] = []  # GB, of each stretch of training between two measurements

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps = {max(1, round(state.max_steps * share)) for share in self.shares}
        done = [point["train_seconds"] for point in self.points if point["step"] <= state.global_step]
        self.started = time.monotonic() - max(done, default=0.0)
        self.measuring = 0.0
        self.peaks = [point["memory_gb"] for point in self.points if point.get("memory_gb")]
        self.memory.restart()
        if self.passing is not None:
            self.passing.begin(state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        probing = time.monotonic()
        passed = {} if self.passing is None else self.passing.passed(state.global_step, model, self.points)
        self.measuring += time.monotonic() - probing
        due = passed or state.global_step in self.steps
        if not due or any(point["step"] == state.global_step for point in self.points):
            return
        began = time.monotonic()
        trained = began - self.started - self.measuring
        if (peak := self.memory.gb()) is not None:
            self.peaks.append(peak)
        metrics = {**passed, **self.evaluator.measure(model)}
        self.memory.restart()
        took = time.monotonic() - began
        self.measuring += took
        batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        seen = pairs_seen(state.global_step, self.pairs, batch)
        spent = {"train_seconds": round(trained, 2), "measure_seconds": round(took, 2)}
        spent |= {"memory_gb": max(self.peaks)} if self.peaks else {}
        self.points.append({"step": state.global_step, "pairs_seen": seen, **spent, **metrics})
        self.points.sort(key=lambda point: point["step"])
        write_json(self.path, self.points, indent=1)

    def on_train_end(self, args, state, control, **kwargs):
        if self.passing is None or not self.points:  # no points: interrupted before the first measurement
            return
        furthest = max(point["kl"] for point in self.points)
        missed = [f"{target:g}" for target in self.passing.targets if target > furthest]
        if missed and state.global_step >= state.max_steps:
            log(f"  KL {', '.join(missed)} was not reached; the highest measured KL is {max(furthest, 0.0):.2f}")


def sample_kl(
    policy: nn.Module, base: nn.Module, prompts: list[list[int]], generations: Sequence[Generation]
) -> np.ndarray:
    """Sum over each response's tokens of log pi_policy - log pi_base, `[responses]` in nats.

    For responses sampled from the policy at temperature 1 the mean is an unbiased estimate of KL(policy || base) per
    response.
    """
    return own_logps(policy, prompts, generations) - response_logps(base, prompts, generations)
