"""Measure a policy against its base: one flat dictionary of metrics (docs/metrics.md describes the keys)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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


def evaluate_run(
    policy: str,
    base: str,
    held_out: Path,
    out: Path,
    settings: EvalSettings,
    *,
    scores: Path | None = None,
    scores_held_out: Path | None = None,
    selection: Path | None = None,
    base_logps: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    tokens_per_row: int | None = None,
    judge: Judge | None = None,
) -> dict[str, float]:
    """Measure a policy against the model it started from, on held-out pairs and prompts.

    All processes of a launch call this and get the metrics; the main process writes the files. The main process also
    runs both models, unless a launch with FSDP shards them: then all processes score and generate together.

    Both models use the same types, so that they never differ by rounding alone. They are loaded one after the other, so
    that one is in memory at a time.

    Args:
        policy, base: models after and before training, with one tokenizer.
        held_out: a pairs table that was not trained on.
        out: folder for `generations.parquet` and `examples.parquet`, and `annotations.json` with a judge.
        scores, selection: token rewards and key tokens of the training pairs, for fidelity (with a gold reward).
        scores_held_out: token rewards of the held-out pairs, for the oracle's accuracy.
        base_logps: the base's stored log-probabilities of `held_out`. They are computed if this is None, or if their
            types or kind of device are not the policy's.
        tokens_per_row: token budget of a packed row when scoring; a default for the device if None.
        judge: compares the answers of policy and base.

    Returns:
        flat metrics, floats by name.
    """
    load = partial(load_model, device=device, dtype=dtype, sharded=processes.read_sharded())

    def read() -> Readings | None:
        stored = None if base_logps is None else read_table(base_logps, "logps")
        return read_models(policy, base, held_out, settings, load, stored, seed, tokens_per_row, out)

    def measure(readings: Readings | None) -> dict[str, float]:
        return {} if readings is None else _metrics_of_models(readings, policy, held_out, out, settings, device, judge)

    def metrics_of_tables() -> dict[str, float]:
        if judge is not None:
            conversations_of(read_table(held_out, "pairs").slice(0, 1))
        return _metrics_of_tables(policy, held_out, settings, scores, scores_held_out, selection)

    metrics = processes.on_main(metrics_of_tables)
    if processes.read_sharded():
        readings = read()
        metrics |= processes.on_main(lambda: measure(readings))
    else:
        metrics |= processes.on_main(lambda: measure(read()))
    if not metrics.get("judge/unanswered"):  # else the judge will be asked again about these responses
        processes.on_main(lambda: _forget_finished(out))
    return metrics


def _forget_finished(out: Path) -> None:
    for path in out.glob(FINISHED.format("*")):
        path.unlink()


class Readings(NamedTuple):
    """Results of running both models.

    Attributes:
        before, after: tables of kind "logps" of the pairs under base and policy; None without pairs.
        base, policy: sampled responses.
        kl: `[responses]`, log-ratio of each of the policy's responses, in nats.
        shown: indices of the example prompts.
        examples: responses to these prompts, by "base" and "policy".
    """

    before: pa.Table | None
    after: pa.Table | None
    base: list[Generation]
    policy: list[Generation]
    kl: np.ndarray
    shown: list[int]
    examples: dict[str, list[Generation]]


def read_models(
    policy: str,
    base: str,
    held_out: Path,
    settings: EvalSettings,
    load: Callable[[str], nn.Module],
    base_logps: pa.Table | None,
    seed: int,
    tokens_per_row: int | None,
    out: Path,
) -> Readings | None:
    """Run policy and base, one after the other; returns None without held-out pairs.

    Args:
        load: loads a model from a folder to its device. If it shards the model, all processes must call this.
        base_logps: a table, as in `evaluate_run`.
        out: folder that keeps finished responses until the evaluation is complete (`FINISHED`).
    """
    tokenizer = load_tokenizer(policy)
    pairs = read_table(held_out, "pairs")
    if not len(pairs):
        return None
    prompts = sample_prompts(pairs, settings.prompts)
    read_by_both = _scored(pairs, settings)
    if base_logps is not None:
        base_logps = _scored(base_logps, settings) if len(read_by_both) else None

    shown = np.linspace(0, len(prompts) - 1, min(settings.examples, len(prompts))).round().astype(int).tolist()
    examples: dict[str, list[Generation]] = {}

    def read(
        name: str, path: str, stored: pa.Table | None, answers: list[Generation] | None
    ) -> tuple[pa.Table | None, list, np.ndarray]:
        """Log-probabilities of the pairs, responses, and log-probabilities of `answers` (the responses if None)."""
        model = load(path)

        def answer(asked: list[list[int]], how: EvalSettings, what: str) -> list[Generation]:
            kept = None
            if not is_sharded(model):
                depends = [model_fingerprint(path), usage_fingerprint(path), numerics(model), asked, seed]
                how_written = how.model_dump(include={"samples", "max_new_tokens", "temperature"})
                kept = FinishedResponses(out / FINISHED.format(what), digest([*depends, how_written]))
            return sample(model, tokenizer, asked, how, seed, progress=what == name, finished=kept)

        if len(read_by_both) and (stored is None or not read_like(stored, model)):
            stored = dataset_logps(model, read_by_both, tokens_per_row=tokens_per_row)
        if not prompts:
            return stored, [], np.zeros(0)
        own = answer(prompts, settings, name)
        if shown:
            examples[name] = answer([prompts[i] for i in shown], settings.of_examples(), f"{name}-examples")
        sums = own_logps(model, prompts, own) if answers is None else response_logps(model, prompts, answers)
        return stored, own, sums

    after, answers, policy_sums = read("policy", policy, None, None)
    _release_memory()
    before, base_answers, base_sums = read("base", base, base_logps, answers)
    _release_memory()
    return Readings(before, after, base_answers, answers, policy_sums - base_sums, shown, examples)


def _scored(table: pa.Table, settings: EvalSettings) -> pa.Table:
    """The pairs that both models score. They are drawn from all: a source is often sorted."""
    return table if settings.pairs is None else take_pairs(table, settings.pairs)


def _metrics_of_tables(
    policy: str,
    held_out: Path,
    settings: EvalSettings,
    scores: Path | None,
    scores_held_out: Path | None,
    selection: Path | None,
) -> dict[str, float]:
    """Metrics that need no model: the oracle's accuracy, and the fidelity of token rewards."""
    metrics: dict[str, float] = {}
    if scores_held_out is not None and len(read_table(held_out, "pairs")):
        scored = read_table(scores_held_out, "scores")
        metrics |= oracle_accuracy(scored) if len(scored) else {}  # given rewards may cover training pairs only
    if scores is not None and settings.gold is not None:
        chosen = read_table(selection, "selection") if selection is not None else None
        valence = gold_reward(settings.gold).valence
        found = fidelity(load_tokenizer(policy), read_table(scores, "scores"), chosen, valence=valence)
        metrics |= _prefixed("fidelity", found)
    return {name: float(value) for name, value in metrics.items()}


def _metrics_of_models(
    readings: Readings,
    policy: str,
    held_out: Path,
    out: Path,
    settings: EvalSettings,
    device: str,
    judge: Judge | None,
) -> dict[str, float]:
    """Metrics of both models' results; writes the responses to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(policy)
    pairs = read_table(held_out, "pairs")
    metrics: dict[str, float] = {}
    if readings.before is not None and readings.after is not None:
        metrics |= policy_accuracy(readings.before, readings.after, _scored(pairs, settings))
    asked = prompt_rows(pairs, settings.prompts)
    if prompts := asked.column("prompt_ids").to_pylist():
        questions = questions_of(asked, tokenizer)
        generations = {"base": readings.base, "policy": readings.policy}
        found, table = judge_generations(generations, readings.kl, tokenizer, prompts, settings)
        metrics |= found
        numbers = [one.prompt_index for one in readings.base]
        table = table.append_column("question", pa.array([questions[number] for number in numbers]))
        if judge is not None:
            conversations = conversations_of(asked)
            found, verdicts, rows = judge(
                [conversations[one.prompt_index] for one in readings.policy],
                *(answers_of(tokenizer, generations[name], prompts) for name in ("base", "policy")),
                [one.prompt_index for one in readings.policy],
                device,
            )
            metrics |= found
            for name, values in verdicts.items():
                table = table.append_column(name, pa.array(values))
            write_json(out / ANNOTATIONS, rows, indent=1)
        write_parquet(out / GENERATIONS, table)
    if readings.shown:
        shown = [questions[number] for number in readings.shown]
        write_parquet(out / EXAMPLES, _side_by_side(shown, readings.examples, tokenizer, settings))
    return {name: float(value) for name, value in metrics.items()}


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
    settings: EvalSettings,
) -> tuple[dict[str, float], pa.Table]:
    """Gold reward, KL and lengths of responses.

    Args:
        generations: responses of "base" and "policy" to the same prompts.
        kl: `[responses]`, log-ratio of each of the policy's responses (`sample_kl`).

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
            gold[name] = gold_reward(settings.gold).scores(texts)
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
            columns[f"{name}_gold"] = gold_reward(settings.gold).scores(texts)
    return pa.table(columns)


def sample_kl(
    policy: nn.Module, base: nn.Module, prompts: list[list[int]], generations: Sequence[Generation]
) -> np.ndarray:
    """Sum over each response's tokens of log pi_policy - log pi_base, `[responses]` in nats.

    For responses sampled from the policy at temperature 1 the mean is an unbiased estimate of KL(policy || base) per
    response.
    """
    return own_logps(policy, prompts, generations) - response_logps(base, prompts, generations)


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
