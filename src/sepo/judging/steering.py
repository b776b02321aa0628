"""Steering at decoding time: a start with an oracle's token rewards added to its logits, without any training.

    log π(y | x, y_<t) = log π_start + α (log π_oracle − log π_reference) + a constant     (all of y | x, y_<t)

This is proxy tuning (arXiv 2401.08565), and for α = 1 with the start as the reference the oracle itself. The models
share a tokenizer. Each keeps its own keys and values, so a step costs one step of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from sepo.data.templates import stop_ids
from sepo.evaluate.generate import Generation, draw_tokens, padded, responses_at_once, uniforms, until_stop
from sepo.forward.scoring import NonFiniteError
from sepo.judging.answering import Done, Engine, Job, check_fits, local_turn
from sepo.judging.prompts import encode_prompts
from sepo.models.adapters import causal_lm
from sepo.models.limits import model_limits


class Steered(NamedTuple):
    """A start that an oracle steers; all models are in memory.

    Attributes:
        reference: None if it is the start.
        alpha: strength; 0 leaves the start as it is.
    """

    start: Any
    oracle: Any
    reference: Any | None
    alpha: float

    def models(self) -> list[Any]:
        """The start, the oracle, and the reference if it is another model than the start."""
        return [model for model in (self.start, self.oracle, self.reference) if model is not None]


def steered_logps(logits: Sequence[torch.Tensor], alpha: float) -> torch.Tensor:
    """The log-probabilities of the next token, `[rows, V]`.

    Args:
        logits: of the start, the oracle and (unless it is the start) the reference, `[rows, V]` each. Entries that not
            all of them have are padding of the vocabulary, and left out.
    """
    width = min(one.shape[-1] for one in logits)
    start, oracle, *reference = (one[:, :width].log_softmax(-1) for one in logits)
    return (start + alpha * (oracle - (reference[0] if reference else start))).log_softmax(-1)


@torch.inference_mode()
def steered_responses(
    steered: Steered,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    sample: int = 0,
) -> tuple[list[Generation], np.ndarray]:
    """One response to each prompt of a batch, with the random numbers of `generate_responses`.

    Args:
        sample: number of the response, for its random numbers.

    Returns:
        the responses with the *steered* log-probabilities; and `[prompts]` sums of those minus the start's, in nats,
        whose mean is the KL from the start at temperature 1.
    """
    device = next(steered.start.parameters()).device
    stops = stop_ids(causal_lm(steered.start), tokenizer)
    input_ids, mask = padded(prompts, 0, tokenizer.pad_token_id, device)
    numbers = np.stack([uniforms(seed, ids, 0, sample, max_new_tokens) for ids in prompts])
    readers = [_Reader(model) for model in steered.models()]
    steps, ended = [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        logits = [reader(input_ids, mask) for reader in readers]
        logps = steered_logps(logits, steered.alpha)
        if not torch.isfinite(logps.amax(-1)).all():
            raise NonFiniteError("the steered logits are not finite: lower --steer, or check the models' weights")
        if temperature:
            drawn = draw_tokens((logps / temperature).softmax(-1), numbers[:, step])[:, None]
        else:
            drawn = logps.argmax(-1, keepdim=True)
        start = logits[0][:, : logps.shape[-1]].log_softmax(-1)
        steps.append([drawn, logps.gather(-1, drawn), start.gather(-1, drawn)])
        ended |= torch.isin(drawn[:, 0], torch.tensor(stops, device=device))
        input_ids, mask = drawn, torch.cat([mask, torch.ones_like(drawn)], -1)
        if ended.all():
            break
    ids, logps, start = (torch.cat(part, -1).tolist() for part in zip(*steps, strict=True))
    responses, ratios = [], []
    for row, tokens in enumerate(ids):
        kept, finished = until_stop(tokens, stops)
        responses.append(Generation(row, sample, kept, finished, logps[row][: len(kept)]))
        ratios.append(sum(logps[row][: len(kept)]) - sum(start[row][: len(kept)]))
    return responses, np.array(ratios)


class _Reader:
    """Reads tokens with one model, and keeps its keys and values."""

    def __init__(self, model: Any):
        self.model: Any = model
        self.cache = DynamicCache(config=causal_lm(model).config)

    def __call__(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The logits of the next token, `[rows, V]`; `mask` covers all tokens so far."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        output = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        logits = output.logits[:, -1]
        return logits if logits.dtype == torch.float64 else logits.float()


def steered_engine(
    steered: Steered,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    seed: int,
    batch_size: int | None = None,
    options: Mapping[str, Any] = {},
) -> Engine:
    """An engine of `sepo.judging.answering` that steers.

    Args:
        batch_size: answers at a time; None for the budget of `generate.py`, divided by the number of models.
        options: keywords for the chat template.
    """
    device = next(steered.start.parameters()).device

    def run(jobs: Sequence[Job], done: Done) -> None:
        ids = encode_prompts([job.messages for job in jobs], tokenizer, options)
        for model in steered.models():
            check_fits(ids, max_new_tokens, model_limits(causal_lm(model)))
        for temperature in dict.fromkeys(job.temperature for job in jobs):
            order = [i for i, job in enumerate(jobs) if job.temperature == temperature]
            order.sort(key=lambda i: -len(ids[i]))
            while order:
                at_once = responses_at_once(len(ids[order[0]]) + max_new_tokens, device) // len(steered.models())
                number = batch_size or max(1, at_once)
                batch, order = order[:number], order[number:]
                responses, _ = steered_responses(
                    steered,
                    tokenizer,
                    [ids[i] for i in batch],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    seed=seed,
                )
                for i, response in zip(batch, responses, strict=True):
                    done(jobs[i], local_turn(tokenizer, ids[i], response.response_ids, response.finished))

    return run
