"""Sampling responses from the model's own distribution, to be judged by a gold reward.

A chat model's saved generation settings usually change its distribution (top-k 50 by default, nucleus sampling,
repetition penalties). A comparison of two models must not: here the saved settings are put aside and tokens are drawn
from softmax(logits / temperature) alone, until the model ends its turn. Drawing keeps the log-probability of every
token, so that in float32 nobody has to read the responses again with the model that wrote them.

Every response has random numbers of its own, one a token, made from the seed, the prompt and the number of the sample.
So it is the same in any batch and beside any other prompts, and two models that answer one prompt share its numbers:
what they draw differs by what they have learnt, and less by luck.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from sepo import processes
from sepo.bars import progress_bar
from sepo.data.templates import stop_ids
from sepo.errors import UserError
from sepo.files import append_line, grown_lines, write_text
from sepo.forward.layers import fast_linear_layers
from sepo.forward.scoring import NonFiniteError
from sepo.models.sharding import is_sharded

_BLOCK = 256
# Tokens from which it pays to read the common start of prompts apart.
_LEAST_SHARED = 8
# Tokens that a batch may hold at its end, prompts, padding and responses: their keys and values stay in memory. On a
# GPU 27 GB for Llama-2-13B (0.82 MB a token in bfloat16), 17 GB for Llama-2-7B, 4 GB for Llama-3-8B.
TOKENS_AT_ONCE = {"cpu": 16_384, "cuda": 32_768, "mps": 8_192}


class Generation(NamedTuple):
    """One sampled response.

    `response_ids` are the new tokens without padding, the end-of-turn token included if the model wrote one;
    `finished` says whether it did (otherwise `max_new_tokens` cut the response off); `logps` are the model's
    log-probabilities of `response_ids` in nats, at temperature 1 whatever the temperature of sampling.
    """

    prompt_index: int
    sample_index: int
    response_ids: list[int]
    finished: bool
    logps: list[float]


class FinishedResponses:
    """Responses that are written, in a file that grows by a line a batch, so that a killed job writes none twice.

    Whole batches are kept, so that those which are written later are composed as they would have been: what comes out
    is the same to the last bit.

    Args:
        path: of the file; one of other responses is replaced.
        key: of all that they depend on beside the prompt: the model, settings, the seed.
    """

    def __init__(self, path: Path, key: str):
        self.path = path
        rows = grown_lines(path)
        if not rows or rows[0] != {"key": key}:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({"key": key}) + "\n")
            rows = []
        self.found: dict[tuple[int, int], Generation] = {}
        for batch in rows[1:]:
            self.found |= {(one[0], one[1]): Generation(*one) for one in batch}

    def add(self, batch: Sequence[Generation]) -> None:
        """Keep a batch: it is on the disk when this returns."""
        append_line(self.path, list(batch))


def generate_responses(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    *,
    samples: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    finished: FinishedResponses | None = None,
) -> list[Generation]:
    """Sample `samples` responses to each prompt.

    Prompts are sorted by length and padded, and what all of a batch begin with is read once. Up to the rounding of the
    model's own sums, a response depends on `seed`, its prompt and its `sample_index` alone: not on the batch, nor on
    the other prompts. No random state is read or moved, and the model's train/eval mode is put back. Where the model is
    cut up over the processes of a launch each writes a share, and all must call this and get all responses.

    Args:
        model: a Transformers causal language model, or a PEFT model around one (its active adapter is used).
        prompt_ids: token ids with the generation prompt of the chat template, if any; no padding.
        temperature: 0 takes the most likely token at every step (one sample a prompt is then enough).
        batch_size: responses at a time; None fits them to the device's `TOKENS_AT_ONCE`.
        finished: batches that an earlier attempt wrote, which are taken as they are, and where this one's are kept; not
            for a model that is cut up.

    Returns:
        `len(prompt_ids) * samples` generations, ordered by prompt, then by sample. Equal prompts have different ones.

    Raises:
        ValueError: a prompt without a token, or a number out of range.
        NonFiniteError: a logit is NaN or +infinity, or all of a row are -infinity.
        UserError: a batch does not fit into the memory of the GPU.
    """
    if samples < 1 or max_new_tokens < 1 or temperature < 0 or (batch_size is not None and batch_size < 1):
        raise ValueError("samples, max_new_tokens and batch_size must be at least 1, temperature at least 0")
    if any(len(ids) == 0 for ids in prompt_ids):
        raise ValueError("a prompt has no token: a response needs at least one token to continue")

    # A PEFT model's adapters live inside the model it wraps, whose `generate` is the plain one.
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    stops = stop_ids(inner, tokenizer)
    config = _plain_config(tokenizer, stops, max_new_tokens)
    device = next(inner.parameters()).device

    occurrences = _occurrences(prompt_ids)
    jobs = [(prompt, sample) for prompt in range(len(prompt_ids)) for sample in range(samples)]
    # The longest first: what does not fit fails at once. Stable: the samples of a prompt stay together.
    jobs.sort(key=lambda job: -len(prompt_ids[job[0]]))
    lengths = [len(prompt_ids[prompt]) + max_new_tokens for prompt, _ in jobs]
    sharded = is_sharded(model)
    shares = processes.size() if sharded else 1
    # Of each process, since all must write as many batches; of which this one has its own.
    batches = [_batches(jobs[share::shares], lengths[share::shares], batch_size, device) for share in range(shares)]
    own = batches[processes.rank() if sharded else 0]
    fillers = [jobs[-1:]] * (max(map(len, batches)) - len(own))
    results: list[Generation] = []
    bar = progress_bar(progress and processes.is_main(), total=len(jobs), desc="generate", unit="response")
    with _undisturbed(model, inner, config), bar:
        for number, batch in enumerate([*own, *fillers]):
            if finished is not None and all(job in finished.found for job in batch):
                results += [finished.found[job] for job in batch]
                bar.update(len(batch))
                continue
            uniform = np.stack(
                [_uniforms(seed, prompt_ids[p], occurrences[p], sample, max_new_tokens) for p, sample in batch]
            )
            draw = _Draw(temperature, torch.from_numpy(uniform))
            try:
                prompts = [prompt_ids[prompt] for prompt, _ in batch]
                new_ids = _generate_batch(inner, prompts, config, device, draw, sharded)
            except torch.OutOfMemoryError:
                raise UserError(
                    f"{len(batch)} responses at once, of up to {max(map(len, prompts)) + max_new_tokens} tokens with "
                    "their prompts, do not fit into "
                    f"the memory of {device}: set eval.batch_size to a lower number"
                ) from None
            if number >= len(own):  # written because the others wrote one
                continue
            written = []
            for (prompt, sample), ids, logps in zip(batch, new_ids, draw.logps(), strict=True):
                ids, ended = _cut(ids, stops)
                written.append(Generation(prompt, sample, ids, ended, logps[: len(ids)]))
            if finished is not None:
                finished.add(written)
            results += written
            bar.update(min(len(batch) * shares, len(jobs) - bar.n))
    if sharded:
        results = [Generation(*one) for part in processes.gather(results) for one in part]
    return sorted(results, key=lambda item: (item.prompt_index, item.sample_index))


def _batches(
    jobs: list[tuple[int, int]], lengths: list[int], batch_size: int | None, device: torch.device
) -> list[list[tuple[int, int]]]:
    """Jobs, the longest first, in batches that the device's memory holds."""
    batches: list[list[tuple[int, int]]] = []
    at = 0
    while at < len(jobs):
        number = batch_size or responses_at_once(lengths[at], device)
        batches.append(jobs[at : at + number])
        at += number
    return batches


def responses_at_once(longest: int, device: torch.device | str) -> int:
    """Responses in a batch whose longest has so many tokens with its prompt: what the device's budget holds, or one."""
    return max(1, TOKENS_AT_ONCE.get(torch.device(device).type, 4096) // longest)


def _occurrences(prompt_ids: Sequence[Sequence[int]]) -> list[int]:
    """How often each prompt came before: equal prompts must not draw the same numbers."""
    seen: Counter[tuple[int, ...]] = Counter()
    numbers = []
    for ids in map(tuple, prompt_ids):
        numbers.append(seen[ids])
        seen[ids] += 1
    return numbers


def _uniforms(seed: int, prompt: Sequence[int], occurrence: int, sample: int, steps: int) -> np.ndarray:
    """The random numbers of one response, `[steps]` float64 in [0, 1)."""
    # With its length before it no prompt is the beginning of another's key.
    return np.random.default_rng([seed, sample, occurrence, len(prompt), *prompt]).random(steps)


def draw_tokens(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The entry of each row at which its distribution function passes a number.

    PyTorch's multinomial draws an exponential for every entry of the vocabulary: 110 ms for 84 rows of 49,152 on two
    CPU cores, a sixth of the time of sampling from SmolLM2. One number a row, sought first among the sums of blocks
    and then within a block, takes 2 ms.

    Args:
        probabilities: `[rows, V]`, not negative; they need not sum to one.
        uniform: `[rows]`, float64, in [0, 1).

    Returns:
        `[rows]` indices, each with a probability above zero.

    >>> draw_tokens(torch.tensor([[0.5, 0.0, 0.5], [0.5, 0.0, 0.5]]), torch.tensor([0.4, 0.6]).double()).tolist()
    [0, 2]
    """
    rows, vocabulary = probabilities.shape
    blocks = torch.nn.functional.pad(probabilities, (0, -vocabulary % _BLOCK)).view(rows, -1, _BLOCK)
    shares = blocks.sum(dim=-1).double()
    at = uniform[:, None] * shares.sum(dim=-1, keepdim=True)
    block = _passes(shares, at)
    before = (shares.cumsum(dim=-1) - shares).gather(-1, block)
    inner = blocks[torch.arange(rows, device=block.device), block[:, 0]].double()
    return (block * _BLOCK + _passes(inner, at - before))[:, 0]


def _passes(weights: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """First entry of each row whose cumulative weight is above `at`; the last one with a weight if none is."""
    cumulative = weights.cumsum(dim=-1)
    # An entry without weight repeats the sum before it, so the first to reach the total is the last with a weight.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(cumulative, at, right=True), last)


class _Draw(LogitsProcessor):
    """Draw each row's next token and keep its log-probability; its score is made the highest, in place."""

    def __init__(self, temperature: float, uniform: torch.Tensor):
        self.temperature = temperature
        self.uniform = uniform  # [rows, steps] float64 on the host: a column is needed at a time
        self._steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # A vocabulary is wide: each pass over the scores takes a hundredth of a step, so there are few.
        highest = scores.amax(dim=-1, keepdim=True)
        weights = (scores - highest).exp_()
        total = highest + weights.sum(dim=-1, keepdim=True).log_()
        if not torch.isfinite(total).all():
            raise NonFiniteError("the model's logits are not finite, so no token can be drawn; check its weights")
        if self.temperature:
            if self.temperature != 1:
                weights = ((scores - highest) / self.temperature).exp_()
            uniform = self.uniform[:, len(self._steps)].to(scores.device)
            drawn = draw_tokens(weights, uniform)[:, None]
        else:
            drawn = scores.argmax(dim=-1, keepdim=True)
        self._steps.append(scores.gather(-1, drawn) - total)
        return scores.scatter_(-1, drawn, torch.inf)

    def logps(self) -> list[list[float]]:
        """Log-probabilities of the drawn tokens by row, those after the end of a response among them."""
        return torch.cat(self._steps, dim=-1).tolist()


def _plain_config(tokenizer: PreTrainedTokenizerBase, stops: list[int], max_new_tokens: int) -> GenerationConfig:
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = stops[0] if stops else 0
    return GenerationConfig(
        do_sample=False,  # takes the one token that _Draw leaves
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=pad,
        use_cache=True,
    )


@contextmanager
def _undisturbed(model: torch.nn.Module, inner: Any, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode and `config` in place of the model's own settings, both put back after.

    Transformers fills every unset field of a generation config from the model's; replacing the model's is the only
    way to be sure that none of them takes part.
    """
    training, saved = model.training, inner.generation_config
    model.eval()
    inner.generation_config = config
    try:
        # What is gathered of a sharded model stays for the next reader, who could not use a tensor of inference mode.
        with torch.no_grad() if is_sharded(model) else torch.inference_mode(), fast_linear_layers(inner):
            yield
    finally:
        inner.generation_config = saved
        model.train(training)


def _generate_batch(
    model: Any,
    prompts: list[Sequence[int]],
    config: GenerationConfig,
    device: torch.device,
    draw: _Draw,
    together: bool,
) -> list[list[int]]:
    shared = 0 if together else _shared_start(prompts)
    if shared and not _reads_start_once(model, prompts, shared, config, device):
        shared = 0
    # A process whose responses have ended goes on until those of all have.
    return _continue(model, prompts, shared, config, device, draw, synced_gpus=together)


def _continue(
    model: Any,
    prompts: Sequence[Sequence[int]],
    shared: int,
    config: GenerationConfig,
    device: torch.device,
    processor: LogitsProcessor,
    **options: Any,
) -> list[list[int]]:
    """New tokens of each prompt. The `shared` first tokens are read once for all, then stands the padding of each.

    shared shared  pad  pad  own  own | new new
    shared shared  own  own  own  own | new new
    """
    longest = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), longest), config.pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        for place, part in ((0, ids[:shared]), (longest - len(ids) + shared, ids[shared:])):
            input_ids[row, place : place + len(part)] = torch.tensor(part)
            attention_mask[row, place : place + len(part)] = 1
    input_ids = input_ids.to(device)
    if shared:
        cache = DynamicCache(config=model.config)
        model(input_ids=input_ids[:1, :shared], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(prompts))
        options["past_key_values"] = cache
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask.to(device),
        logits_processor=LogitsProcessorList([processor]),
        **options,
    )
    return output[:, longest:].tolist()


def _shared_start(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, each having one more at least; 0 where reading them once is not worth it.

    A chat template opens every conversation with the same system message: half of a usual prompt of SmolLM2.
    """
    most = min(map(len, prompts)) - 1
    number = next((i for i in range(most) if any(ids[i] != prompts[0][i] for ids in prompts)), most)
    return number if len(prompts) > 1 and number >= _LEAST_SHARED else 0


def _reads_start_once(
    model: Any, prompts: Sequence[Sequence[int]], shared: int, config: GenerationConfig, device: torch.device
) -> bool:
    """Does a model give the same when the start of prompts is read once, and padding stands behind it?

    A window of attention or a recurrent state would count the padding, and frequencies that depend on what is read
    would be another's. What the config does not tell is tried once: a long and a short prompt, both ways, two tokens.
    """
    if (known := getattr(model, "sepo_reads_start_once", None)) is not None:
        return known
    rope = str(getattr(model.config.get_text_config(), "rope_parameters", None))
    good = "dynamic" not in rope and "longrope" not in rope
    good = good and all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    if good:
        whole = max(prompts, key=len)
        probe = [whole, [*whole[:shared], whole[-1]]]
        try:
            found = []
            for start in (shared, 0):
                watched = _Watched(whole[-1])
                _continue(model, probe, start, config, device, watched, max_new_tokens=2)
                found.append(torch.stack(watched.logps))
            tolerance = 2e-3 if computes_exactly(model) and found[0].dtype.itemsize >= 4 else 0.25
            good = bool((found[0] - found[1]).abs().max() < tolerance)
        except (RuntimeError, TypeError, ValueError, AttributeError):  # a forward that takes no such cache
            good = False
    model.sepo_reads_start_once = good
    return good


def computes_exactly(model: torch.nn.Module) -> bool:
    """Is a model's forward computed in float32 or wider?

    Under autocast, and wrapped by Accelerate for mixed precision, it is not, whatever the types of weights and logits.
    """
    wide = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
    kind = next(model.parameters()).device.type
    return wide and not hasattr(model, "_original_forward") and not torch.is_autocast_enabled(kind)


class _Watched(LogitsProcessor):
    """Keep the log-probabilities of every step, and go on with one token whatever they are."""

    def __init__(self, token: int):
        self.token = token
        self.logps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logps.append(scores.log_softmax(-1))
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.token] = 0.0
        return forced


def _cut(ids: list[int], stops: list[int]) -> tuple[list[int], bool]:
    """Drop what follows the first stop token (padding), and say whether there was one."""
    for index, token in enumerate(ids):
        if token in stops:
            return ids[: index + 1], True
    return ids, False
