"""Everything that is measured about a run, as one flat dictionary (docs/metrics.md describes the keys)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sepo.credit.rewards import response_sums
from sepo.data.splits import sample_prompts
from sepo.data.tables import make_table, read_table, write_parquet
from sepo.evaluate.accuracy import _prefixed, oracle_accuracy, policy_accuracy
from sepo.evaluate.fidelity import fidelity
from sepo.evaluate.generate import Generation, generate_responses
from sepo.evaluate.gold import gold_reward
from sepo.evaluate.statistics import mean_and_se, paired_difference
from sepo.forward.passes import dataset_logps
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.recipe.settings import EvalSettings


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
) -> dict[str, float]:
    """Measure a policy against the model it started from, on held-out pairs and prompts.

    Args:
        policy, base: models after and before training, with one tokenizer.
        held_out: a pairs table that was not trained on.
        out: folder for `generations.parquet`.
        scores, selection: token rewards and key tokens of the training pairs, for fidelity (with a gold reward).
        scores_held_out: token rewards of the held-out pairs, for the oracle's accuracy.
        base_logps: the base's stored log-probabilities of `held_out`; computed when None.

    Returns:
        flat metrics, floats by name.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(policy)
    pairs = read_table(held_out, "pairs")
    metrics: dict[str, float] = {}
    if scores_held_out is not None and len(pairs):
        metrics |= oracle_accuracy(read_table(scores_held_out, "scores"))
    if scores is not None and settings.gold is not None:
        chosen = read_table(selection, "selection") if selection is not None else None
        metrics |= _prefixed("fidelity", fidelity(tokenizer, read_table(scores, "scores"), chosen))

    models = {name: load_model(path, device=device, dtype=dtype) for name, path in (("base", base), ("policy", policy))}
    if len(pairs):
        before = read_table(base_logps, "logps") if base_logps is not None else dataset_logps(models["base"], pairs)
        metrics |= policy_accuracy(before, dataset_logps(models["policy"], pairs), pairs)
    prompts = sample_prompts(pairs, settings.prompts)
    if prompts:
        metrics |= measure_generations(models, tokenizer, prompts, settings, seed, out / "generations.parquet")
    return {name: float(value) for name, value in metrics.items()}


def measure_generations(
    models: Mapping[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    settings: EvalSettings,
    seed: int,
    out: Path,
) -> dict[str, float]:
    """Generate from base and policy, store the texts in `out`, and measure gold reward, KL and lengths."""
    generations: dict[str, list[Generation]] = {}
    for name, model in models.items():
        generations[name] = generate_responses(
            model,
            tokenizer,
            prompts,
            samples=settings.samples,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=seed,
        )
    texts = {
        name: [str(tokenizer.decode(one.response_ids, skip_special_tokens=True)) for one in items]
        for name, items in generations.items()
    }
    metrics: dict[str, float] = {}
    columns: dict[str, object] = {
        "prompt": [tokenizer.decode(prompts[one.prompt_index]) for one in generations["base"]],
        "sample": [one.sample_index for one in generations["base"]],
    }
    groups = [one.prompt_index for one in generations["base"]]
    gold: dict[str, np.ndarray] = {}
    for name, items in generations.items():
        lengths = np.array([len(one.response_ids) for one in items])
        metrics[f"length/{name}"], metrics[f"length/{name}_se"] = mean_and_se(lengths, groups)
        metrics[f"finished/{name}"] = float(np.mean([one.finished for one in items]))
        columns[name] = texts[name]
        columns[f"{name}_tokens"] = lengths
        if settings.gold is not None:
            gold[name] = gold_reward(settings.gold)(texts[name])
            metrics[f"gold_reward/{name}"], metrics[f"gold_reward/{name}_se"] = mean_and_se(gold[name], groups)
            columns[f"{name}_gold"] = gold[name]
    if gold:
        difference, error = paired_difference(gold["policy"], gold["base"], groups)
        metrics["gold_reward/difference"], metrics["gold_reward/difference_se"] = difference, error
        wins = 0.5 * (1 + np.sign(gold["policy"] - gold["base"]))
        metrics["gold_reward/win_rate"], metrics["gold_reward/win_rate_se"] = mean_and_se(wins, groups)
    kl = sample_kl(models["base"], prompts, generations["policy"])
    columns["policy_kl"] = kl
    metrics["kl"], metrics["kl_se"] = mean_and_se(kl, groups)
    tokens = np.array([len(one.response_ids) for one in generations["policy"]])
    metrics["kl_per_token"] = float(kl.sum() / tokens.sum())
    metrics["prompts"] = len(prompts)
    write_parquet(out, pa.table(columns))
    return metrics


@torch.no_grad()
def sample_kl(base: nn.Module, prompts: list[list[int]], generations: list[Generation]) -> np.ndarray:
    """Per response sampled from a policy: sum of log pi_policy - log pi_base over its tokens, in nats.

    Its mean is an unbiased estimate of KL(policy || base) per response when sampling was at temperature 1. The
    policy's log-probabilities are those that sampling kept; only the base reads the responses.
    """
    ids = [list(one.response_ids) for one in generations]
    pairs = make_table(
        "pairs",
        {
            "pair_id": list(range(len(ids))),
            "prompt_ids": [prompts[one.prompt_index] for one in generations],
            "chosen_ids": ids,
            # A pair needs a second side; the first token alone is a branch that adds no tokens to read.
            "rejected_ids": [response[:1] for response in ids],
        },
    )
    before, _ = response_sums(dataset_logps(base, pairs), "logps")
    return np.array([sum(one.logps) for one in generations]) - before
