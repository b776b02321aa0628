"""Measure a policy against its base: one flat dictionary of metrics (docs/metrics.md describes the keys)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sepo import processes
from sepo.data.conversation import CONVERSATION, Conversation, conversations_of, in_words
from sepo.data.previews import previews
from sepo.data.splits import prompt_rows, sample_prompts, take_pairs
from sepo.data.tables import read_table, write_parquet
from sepo.data.thinking import answer_of
from sepo.evaluate import ANNOTATIONS, EXAMPLES, GENERATIONS
from sepo.evaluate.accuracy import _prefixed, oracle_accuracy, policy_accuracy
from sepo.evaluate.fidelity import fidelity
from sepo.evaluate.generate import FinishedResponses, Generation, computes_exactly, generate_responses
from sepo.evaluate.gold import gold_reward
from sepo.evaluate.statistics import mean_and_se, paired_difference
from sepo.files import digest, write_json
from sepo.forward.scoring import dataset_logps, numerics, read_like, summed_logps
from sepo.models.fingerprint import model_fingerprint, usage_fingerprint
from sepo.models.sharding import is_sharded
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.recipe.settings import EvalSettings

# The finished responses of each model, from which an interrupted evaluation continues.
FINISHED = "finished-{}.jsonl"

# A judge of the policy's answers: (conversations, answers of the base, of the policy, number of each prompt, device) ->
# metrics, columns for the table of generations, annotations. An answer is None where the thinking has no end.
Judge = Callable[
    [Sequence[Conversation], Sequence[str | None], Sequence[str | None], Sequence[int], str],
    tuple[dict[str, float], dict[str, list[Any]], list[dict[str, Any]]],
]


class Readings(NamedTuple):
    """What one of the two models gave.

    Attributes:
        logps: log-probabilities of the pairs, a table of kind "logps"; None without pairs.
        responses: sampled responses.
        examples: responses to the example prompts.
        sums: `[responses]`, log-probabilities of the policy's responses, in nats.
    """

    logps: pa.Table | None
    responses: list[Generation]
    examples: list[Generation]
    sums: np.ndarray


@dataclass
class Evaluation:
    """A policy against the model it started from, on held-out pairs and prompts.

    Both models use the same types, so that they never differ by rounding alone. They are loaded one after the other, so
    that one is in memory at a time.

    Attributes:
        policy, base: models after and before training, with one tokenizer.
        held_out: a pairs table that was not trained on.
        out: folder for `generations.parquet` and `examples.parquet`, and `annotations.json` with a judge. It keeps
            finished responses until the evaluation is complete (`FINISHED`).
        scores, selection: token rewards and key tokens of the training pairs, for fidelity (with a gold reward).
        scores_held_out: token rewards of the held-out pairs, for the oracle's accuracy.
        base_logps: the base's stored log-probabilities of `held_out`. They are computed if this is None, or if their
            types or kind of device are not the policy's.
        tokens_per_row: token budget of a packed row when scoring; a default for the device if None.
        judge: compares the answers of policy and base.
    """

    policy: str
    base: str
    held_out: Path
    out: Path
    settings: EvalSettings
    scores: Path | None = None
    scores_held_out: Path | None = None
    selection: Path | None = None
    base_logps: Path | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    tokens_per_row: int | None = None
    judge: Judge | None = None

    def measure(self) -> dict[str, float]:
        """Run both models, and return all metrics, floats by name.

        All processes of a launch call this and get the metrics; the main process writes the files. The main process
        also runs both models, unless a launch with FSDP shards them: then all processes score and generate together.
        """
        metrics = processes.on_main(self._metrics_of_tables)
        if processes.read_sharded():
            readings = self._read_models()
            metrics |= processes.on_main(lambda: self._metrics_of_models(*readings))
        else:
            metrics |= processes.on_main(lambda: self._metrics_of_models(*self._read_models()))
        if not metrics.get("judge/unanswered"):  # else the judge will be asked again about these responses
            processes.on_main(self._forget_finished)
        return metrics

    @cached_property
    def _pairs(self) -> pa.Table:
        return read_table(self.held_out, "pairs")

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.policy)

    @cached_property
    def _prompts(self) -> list[list[int]]:
        return sample_prompts(self._pairs, self.settings.prompts)

    @cached_property
    def _shown(self) -> list[int]:
        """Indices of the example prompts."""
        number = min(self.settings.examples, len(self._prompts))
        return np.linspace(0, len(self._prompts) - 1, number).round().astype(int).tolist()

    def _forget_finished(self) -> None:
        for path in self.out.glob(FINISHED.format("*")):
            path.unlink()

    def _read_models(self) -> tuple[Readings, Readings]:
        """Run policy and base, one after the other. If the launch shards models, all processes must call this."""
        policy = self._read("policy", self.policy, None, None)
        _release_memory()
        stored = None if self.base_logps is None else _scored(read_table(self.base_logps, "logps"), self.settings)
        base = self._read("base", self.base, stored, policy.responses)
        _release_memory()
        return policy, base

    def _read(self, name: str, path: str, logps: pa.Table | None, answers: list[Generation] | None) -> Readings:
        """Run one model; `sums` are of `answers`, or of the model's own responses if this is None."""
        if not len(self._pairs):
            return Readings(None, [], [], np.zeros(0))
        pairs = _scored(self._pairs, self.settings)
        model = load_model(path, device=self.device, dtype=self.dtype, sharded=processes.read_sharded())
        if not len(pairs):
            logps = None
        elif logps is None or not read_like(logps, model):
            logps = dataset_logps(model, pairs, tokens_per_row=self.tokens_per_row)
        if not self._prompts:
            return Readings(logps, [], [], np.zeros(0))
        responses = self._answers(model, path, self._prompts, self.settings, name)
        shown = [self._prompts[index] for index in self._shown]
        how = self.settings.of_examples()
        examples = self._answers(model, path, shown, how, f"{name}-examples") if shown else []
        if answers is None:
            return Readings(logps, responses, examples, own_logps(model, self._prompts, responses))
        return Readings(logps, responses, examples, response_logps(model, self._prompts, answers))

    def _answers(
        self, model: nn.Module, path: str, asked: list[list[int]], how: EvalSettings, name: str
    ) -> list[Generation]:
        """A model's responses to prompts; finished ones of an earlier attempt are reused."""
        finished = None
        if not is_sharded(model):
            depends = [model_fingerprint(path), usage_fingerprint(path), numerics(model), asked, self.seed]
            how_written = how.model_dump(include={"samples", "max_new_tokens", "temperature"})
            finished = FinishedResponses(self.out / FINISHED.format(name), digest([*depends, how_written]))
        progress = name in ("base", "policy")
        return sample(model, self._tokenizer, asked, how, self.seed, progress=progress, finished=finished)

    def _metrics_of_tables(self) -> dict[str, float]:
        """Metrics that need no model: the oracle's accuracy, and the fidelity of token rewards."""
        if self.judge is not None:
            conversations_of(self._pairs.slice(0, 1))
        metrics: dict[str, float] = {}
        if self.scores_held_out is not None and len(self._pairs):
            scored = read_table(self.scores_held_out, "scores")
            metrics |= oracle_accuracy(scored) if len(scored) else {}  # given rewards may cover training pairs only
        if self.scores is not None and self.settings.gold is not None:
            chosen = read_table(self.selection, "selection") if self.selection is not None else None
            truth = gold_reward(self.settings.gold).truth
            found = fidelity(self._tokenizer, read_table(self.scores, "scores"), chosen, truth=truth)
            metrics |= _prefixed("fidelity", found)
        return {name: float(value) for name, value in metrics.items()}

    def _metrics_of_models(self, policy: Readings, base: Readings) -> dict[str, float]:
        """Metrics of both models' results; writes the responses to `out`."""
        if not len(self._pairs):
            return {}
        self.out.mkdir(parents=True, exist_ok=True)
        metrics: dict[str, float] = {}
        if base.logps is not None and policy.logps is not None:
            metrics |= policy_accuracy(base.logps, policy.logps, _scored(self._pairs, self.settings))
        if self._prompts:
            asked = prompt_rows(self._pairs, self.settings.prompts)
            questions = questions_of(asked, self._tokenizer)
            generations = {"base": base.responses, "policy": policy.responses}
            kl = policy.sums - base.sums
            found, table = judge_generations(generations, kl, self._tokenizer, self._prompts, questions, self.settings)
            numbers = [response.prompt_index for response in base.responses]
            table = table.append_column("question", pa.array([questions[number] for number in numbers]))
            metrics |= found
            if self.judge is not None:
                metrics_of_judge, table = self._judged(self.judge, conversations_of(asked), generations, table)
                metrics |= metrics_of_judge
            write_parquet(self.out / GENERATIONS, table)
            if self._shown:
                shown = [questions[number] for number in self._shown]
                answers = {"base": base.examples, "policy": policy.examples}
                write_parquet(self.out / EXAMPLES, _side_by_side(shown, answers, self._tokenizer, self.settings))
        return {name: float(value) for name, value in metrics.items()}

    def _judged(
        self,
        judge: Judge,
        conversations: Sequence[Conversation],
        generations: Mapping[str, list[Generation]],
        table: pa.Table,
    ) -> tuple[dict[str, float], pa.Table]:
        """The judge's metrics, and the table of responses with its verdicts; writes its annotations."""
        numbers = [response.prompt_index for response in generations["policy"]]
        asked = [conversations[number] for number in numbers]
        base, policy = (answers_of(self._tokenizer, generations[name], self._prompts) for name in ("base", "policy"))
        metrics, verdicts, annotations = judge(asked, base, policy, numbers, self.device)
        for name, values in verdicts.items():
            table = table.append_column(name, pa.array(values))
        write_json(self.out / ANNOTATIONS, annotations, indent=1)
        return metrics, table


def _scored(table: pa.Table, settings: EvalSettings) -> pa.Table:
    """The pairs that both models score. They are drawn from all: a source is often sorted."""
    return table if settings.pairs is None else take_pairs(table, settings.pairs)


def questions_of(pairs: pa.Table, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The question of each pair in words; for tables without conversations a preview of the prompt's ids."""
    if CONVERSATION not in pairs.column_names:
        return previews(tokenizer, pairs.column("prompt_ids").to_pylist())
    return [in_words(conversation.messages) for conversation in conversations_of(pairs)]


def _release_memory() -> None:
    """Free an unreferenced model, with its reference cycles, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sample(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    settings: EvalSettings,
    seed: int,
    progress: bool = False,
    finished: FinishedResponses | None = None,
) -> list[Generation]:
    """Sample responses to the prompts by the settings; `finished` as in `generate_responses`."""
    return generate_responses(
        model,
        tokenizer,
        prompts,
        samples=settings.samples,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=seed,
        batch_size=settings.batch_size,
        progress=progress,
        finished=finished,
    )


def decoded(tokenizer: PreTrainedTokenizerBase, generations: Sequence[Generation]) -> list[str]:
    """The texts of responses, without special tokens."""
    return [str(tokenizer.decode(one.response_ids, skip_special_tokens=True)) for one in generations]


def answers_of(
    tokenizer: PreTrainedTokenizerBase, generations: Sequence[Generation], prompts: Sequence[Sequence[int]]
) -> list[str | None]:
    """The texts of responses without thinking, for a judge; None where the thinking has no end."""
    return [answer_of(tokenizer, one.response_ids, prompts[one.prompt_index]) for one in generations]


def judge_generations(
    generations: Mapping[str, list[Generation]],
    kl: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    questions: Sequence[str],
    settings: EvalSettings,
) -> tuple[dict[str, float], pa.Table]:
    """Gold reward, KL and lengths of responses.

    Args:
        generations: responses of "base" and "policy" to the same prompts.
        kl: `[responses]`, log-ratio of each of the policy's responses.
        questions: the prompts in words (`questions_of`).

    Returns:
        metrics, and a table with a row for each prompt and sample.
    """
    metrics: dict[str, float] = {}
    columns: dict[str, object] = {
        "prompt": [tokenizer.decode(prompts[one.prompt_index]) for one in generations["base"]],
        "sample": [one.sample_index for one in generations["base"]],
    }
    groups = [one.prompt_index for one in generations["base"]]
    gold: dict[str, np.ndarray] = {}
    for name, items in generations.items():
        texts = decoded(tokenizer, items)
        lengths = np.array([len(one.response_ids) for one in items])
        metrics[f"length/{name}"], metrics[f"length/{name}_se"] = mean_and_se(lengths, groups)
        metrics[f"finished/{name}"] = float(np.mean([one.finished for one in items]))
        columns[name] = texts
        columns[f"{name}_tokens"] = lengths
        if settings.gold is not None:
            gold[name] = gold_reward(settings.gold).scores([questions[group] for group in groups], texts)
            metrics[f"gold_reward/{name}"], metrics[f"gold_reward/{name}_se"] = mean_and_se(gold[name], groups)
            columns[f"{name}_gold"] = gold[name]
    if gold:
        difference, error = paired_difference(gold["policy"], gold["base"], groups)
        metrics["gold_reward/difference"], metrics["gold_reward/difference_se"] = difference, error
        wins = 0.5 * (1 + np.sign(gold["policy"] - gold["base"]))
        metrics["gold_reward/win_rate"], metrics["gold_reward/win_rate_se"] = mean_and_se(wins, groups)
    columns["policy_kl"] = kl
    metrics["kl"], metrics["kl_se"] = mean_and_se(kl, groups)
    tokens = np.array([len(one.response_ids) for one in generations["policy"]])
    metrics["kl_per_token"] = float(kl.sum() / tokens.sum())
    metrics["prompts"] = len(prompts)
    return metrics, pa.table(columns)


def _side_by_side(
    questions: list[str],
    answers: Mapping[str, list[Generation]],
    tokenizer: PreTrainedTokenizerBase,
    settings: EvalSettings,
) -> pa.Table:
    """A table with the answers of "base" and "policy" to each question, and their gold rewards if there are any."""
    columns: dict[str, object] = {"prompt": questions}
    for name in ("base", "policy"):
        texts = decoded(tokenizer, answers[name])
        columns[name] = texts
        if settings.gold is not None:
            columns[f"{name}_gold"] = gold_reward(settings.gold).scores(questions, texts)
    return pa.table(columns)


def own_logps(policy: nn.Module, prompts: list[list[int]], generations: Sequence[Generation]) -> np.ndarray:
    """Summed log-probability of each of a policy's own responses, `[responses]`, comparable with another model's.

    In float32 these are the log-probabilities recorded in sampling. In fewer bits a generation step (with a cache,
    padded) and a packed row round differently, by 0.05 nats per token, and a model's KL to itself would not be 0: so
    the policy scores its responses again.
    """
    if computes_exactly(policy):
        return np.array([sum(one.logps) for one in generations])
    return response_logps(policy, prompts, generations)


def response_logps(model: nn.Module, prompts: list[list[int]], generations: Sequence[Generation]) -> np.ndarray:
    """Summed log-probability of each response under a model, `[responses]` in nats."""
    asked = [prompts[one.prompt_index] for one in generations]
    return summed_logps(model, asked, [list(one.response_ids) for one in generations])
