"""Sampling responses from the model's own distribution, to be judged by a gold reward.

A chat model's saved generation settings usually change its distribution (top-k 50 by default, nucleus sampling,
repetition penalties). A comparison of two models must not: here the saved settings are put aside and tokens are drawn
from softmax(logits / temperature) alone, until the model ends its turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sepo.models import stop_ids


class Generation(NamedTuple):
    """One sampled response.

    `response_ids` are the new tokens without padding, the end-of-turn token included if the model wrote one;
    `finished` says whether it did (otherwise `max_new_tokens` cut the response off).
    """

    prompt_index: int
    sample_index: int
    response_ids: list[int]
    finished: bool


def generate_responses(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    *,
    samples: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> list[Generation]:
    """Sample `samples` responses to each prompt.

    Prompts are sorted by length and padded on the left, `batch_size` responses at a time. The result depends on
    `seed`, `batch_size` and the prompts alone: the random state of the caller is neither read nor moved, and the
    model's train/eval mode is put back.

    Args:
        model: a Transformers causal language model, or a PEFT model around one (its active adapter is used).
        prompt_ids: token ids with the generation prompt of the chat template, if any; no padding.
        temperature: 0 takes the most likely token at every step (one sample a prompt is then enough).

    Returns:
        `len(prompt_ids) * samples` generations, ordered by prompt, then by sample.

    Raises:
        ValueError: a prompt without a token, or a number out of range.
    """
    if samples < 1 or max_new_tokens < 1 or batch_size < 1 or temperature < 0:
        raise ValueError("samples, max_new_tokens and batch_size must be at least 1, temperature at least 0")
    if any(len(ids) == 0 for ids in prompt_ids):
        raise ValueError("a prompt has no token: a response needs at least one token to continue")

    # A PEFT model's adapters live inside the model it wraps, whose `generate` is the plain one.
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    stops = stop_ids(inner, tokenizer)
    config = _plain_config(tokenizer, stops, max_new_tokens, temperature)
    device = next(inner.parameters()).device

    jobs = [(prompt, sample) for prompt in range(len(prompt_ids)) for sample in range(samples)]
    jobs.sort(key=lambda job: len(prompt_ids[job[0]]))  # stable: the samples of a prompt stay together
    results: list[Generation] = []
    with _undisturbed(model, inner, config, seed), tqdm(total=len(jobs), desc="generate", disable=not progress) as bar:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            new_ids = _generate_batch(inner, [prompt_ids[prompt] for prompt, _ in batch], config, device)
            for (prompt, sample), ids in zip(batch, new_ids, strict=True):
                results.append(Generation(prompt, sample, *_cut(ids, stops)))
            bar.update(len(batch))
    return sorted(results, key=lambda item: (item.prompt_index, item.sample_index))


def _plain_config(
    tokenizer: PreTrainedTokenizerBase, stops: list[int], max_new_tokens: int, temperature: float
) -> GenerationConfig:
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = stops[0] if stops else 0
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    return GenerationConfig(
        **{"do_sample": False, **sampling},
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=pad,
        use_cache=True,
    )


@contextmanager
def _undisturbed(model: torch.nn.Module, inner: Any, config: GenerationConfig, seed: int) -> Iterator[None]:
    """Evaluation mode, a seeded random state and `config` in place of the model's own settings, all put back after.

    Transformers fills every unset field of a generation config from the model's; replacing the model's is the only
    way to be sure that none of them takes part.
    """
    training, saved = model.training, inner.generation_config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.eval()
        inner.generation_config = config
        try:
            with torch.inference_mode():
                yield
        finally:
            inner.generation_config = saved
            model.train(training)


def _generate_batch(
    model: Any, prompts: list[Sequence[int]], config: GenerationConfig, device: torch.device
) -> list[list[int]]:
    longest = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), longest), config.pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        attention_mask[row, longest - len(ids) :] = 1
    output = model.generate(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device))
    return output[:, longest:].tolist()


def _cut(ids: list[int], stops: list[int]) -> tuple[list[int], bool]:
    """Drop what follows the first stop token (padding), and say whether there was one."""
    for index, token in enumerate(ids):
        if token in stops:
            return ids[: index + 1], True
    return ids, False
