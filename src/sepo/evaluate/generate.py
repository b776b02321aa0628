"""Sample responses from a model's own distribution.

A chat model's saved generation settings usually change its distribution (top-k 50 by default, nucleus sampling,
repetition penalties), which would distort a comparison of two models. Here the saved settings are ignored: tokens are
drawn from softmax(logits / temperature) until the model ends its turn. Drawing records each token's log-probability,
so in float32 the model need not read its responses again.

Every response has its own random numbers, one per token, derived from the seed, the prompt and the sample's number. So
a response does not depend on its batch or on other prompts. Two models that answer one prompt share its numbers, which
reduces the difference that chance makes between them.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sepo import processes
from sepo.bars import progress_bar
from sepo.data.templates import stop_ids
from sepo.errors import UserError
from sepo.files import append_line, grown_lines, write_text
from sepo.forward.scoring import NonFiniteError
from sepo.kernels.layers import fast_linear_layers
from sepo.models.adapters import causal_lm
from sepo.models.sharding import is_sharded

_BLOCK = 256
# The fewest common first tokens of prompts that are worth reading once for all.
_LEAST_SHARED = 8
# Most tokens of a finished batch, with prompts and padding: their keys and values stay in memory. On a GPU these take
# 27 GB for Llama-2-13B (0.82 MB per token in bfloat16), 17 GB for Llama-2-7B, 4 GB for Llama-3-8B.
TOKENS_AT_ONCE = {"cpu": 16_384, "cuda": 32_768, "mps": 8_192}


class Generation(NamedTuple):
    """One sampled response.

    Attributes:
        response_ids: the new tokens without padding, with the end-of-turn token if the model wrote one.
        finished: whether it did; otherwise `max_new_tokens` cut the response off.
        logps: the model's log-probabilities of `response_ids` in nats, at temperature 1 even if sampled at another.
    """

    prompt_index: int
    sample_index: int
    response_ids: list[int]
    finished: bool
    logps: list[float]


class FinishedResponses:
    """A file of generated responses, one line per batch, from which a killed job continues.

    It keeps whole batches, so the remaining batches have the same members and the results are the same to the last bit.

    Args:
        path: the file; a file with another key is replaced.
        key: digest of everything that the responses depend on beside the prompt: the model, settings, the seed.

    Attributes:
        found: the stored responses by (prompt index, sample index).
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
            self.found |= {(row[0], row[1]): Generation(*row) for row in batch}

    def add(self, batch: Sequence[Generation]) -> None:
        """Append a batch; it is on the disk when this returns."""
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

    Prompts are sorted by length and padded; the common start of a batch's prompts is read once. Up to the rounding of
    the model's sums, a response depends only on `seed`, its prompt and its `sample_index`, not on the batch or on other
    prompts. Global random states are not used. The model's train/eval mode is restored. For a sharded model all
    processes of the launch must call this; each generates a share, and all get all responses.

    Args:
        model: a Transformers causal language model, or a PEFT model around one (with its active adapter).
        prompt_ids: token ids, with the generation prompt of the chat template if there is one; no padding.
        temperature: 0 takes the most likely token at every step (one sample per prompt is then enough).
        batch_size: responses per batch; None fills the device's `TOKENS_AT_ONCE`.
        finished: batches of an earlier attempt, which are reused; new batches are added. Not for a sharded model.

    Returns:
        `len(prompt_ids) * samples` generations, ordered by prompt, then by sample. Equal prompts have different ones.

    Raises:
        ValueError: a prompt without a token, or a number out of range.
        NonFiniteError: a logit is NaN or +infinity, or all of a row are -infinity.
        UserError: a batch does not fit into the memory of the GPU.
    """
    if samples < 1 or max_new_tokens < 1 or temperature < 0 or (batch_size is not None and batch_size < 1):
        raise ValueError("samples, max_new_tokens and batch_size must be at least 1, temperature at least 0")
    sampler = _Sampler(model, tokenizer, prompt_ids, max_new_tokens, temperature, seed, finished)
    jobs = [(prompt, sample) for prompt in range(len(prompt_ids)) for sample in range(samples)]
    # The longest first: a batch that does not fit fails at once. A stable sort keeps the samples of a prompt together.
    jobs.sort(key=lambda job: -len(prompt_ids[job[0]]))
    with _undisturbed(model, sampler.inner, sampler.config):
        results = _sample_all(sampler, jobs, batch_size, progress)
    return sorted(results, key=lambda item: (item.prompt_index, item.sample_index))


def _sample_all(
    sampler: _Sampler, jobs: list[tuple[int, int]], batch_size: int | None, progress: bool
) -> list[Generation]:
    """One response for each (prompt, sample); the ranks of a sharded model each generate a share and get all."""
    ranks, rank = (processes.size(), processes.rank()) if sampler.together else (1, 0)
    of_ranks = [sampler.batches(jobs[i::ranks], batch_size) for i in range(ranks)]
    batches = of_ranks[rank]
    # Ranks of a sharded model must generate equally many batches.
    dummies = [jobs[-1:]] * (max(map(len, of_ranks)) - len(batches))
    results: list[Generation] = []
    with progress_bar(progress and processes.is_main(), total=len(jobs), desc="generate", unit="response") as bar:
        for batch in batches:
            results += sampler.sample(batch)
            bar.update(min(len(batch) * ranks, len(jobs) - bar.n))
        for batch in dummies:
            sampler.sample(batch)
    if sampler.together:
        results = [Generation(*row) for part in processes.gather(results) for row in part]
    return results


class _Sampler:
    """Samples batches of responses to (prompt, sample) jobs with one model and one seed."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        finished: FinishedResponses | None,
    ):
        if any(len(ids) == 0 for ids in prompt_ids):
            raise ValueError("a prompt has no token: a response needs at least one token to continue")
        # A PEFT model's adapters are inside the model that it wraps, whose `generate` is the plain one.
        self.inner: Any = causal_lm(model) if isinstance(model, PeftModel) else model
        self.stops = stop_ids(self.inner, tokenizer)
        self.config = _plain_config(tokenizer, self.stops, max_new_tokens)
        self.device = next(self.inner.parameters()).device
        self.together = is_sharded(model)
        self._prompt_ids, self._occurrences = prompt_ids, _occurrences(prompt_ids)
        self._max_new_tokens, self._temperature, self._seed = max_new_tokens, temperature, seed
        self._finished = finished

    def batches(self, jobs: list[tuple[int, int]], batch_size: int | None) -> list[list[tuple[int, int]]]:
        """Divide jobs, the longest first, into batches that fit the device's memory."""
        batches: list[list[tuple[int, int]]] = []
        at = 0
        while at < len(jobs):
            longest = len(self._prompt_ids[jobs[at][0]]) + self._max_new_tokens
            number = batch_size or responses_at_once(longest, self.device)
            batches.append(jobs[at : at + number])
            at += number
        return batches

    def sample(self, batch: Sequence[tuple[int, int]]) -> list[Generation]:
        """One response for each (prompt, sample) of a batch: those of an earlier attempt, or new ones."""
        if self._finished is not None and all(job in self._finished.found for job in batch):
            return [self._finished.found[job] for job in batch]
        prompts = [self._prompt_ids[prompt] for prompt, _ in batch]
        draw = _Draw(self._temperature, self._uniform(batch))
        generated = self._generations(batch, self._generate(prompts, draw), draw)
        if self._finished is not None:
            self._finished.add(generated)
        return generated

    def sample_prompts(self, numbers: Sequence[int], temperatures: Sequence[float]) -> list[Generation]:
        """`len(temperatures)` responses to each of some prompts; each prompt is read once for all of its responses."""
        batch = [(prompt, sample) for prompt in numbers for sample in range(len(temperatures))]
        draw = _Draw(torch.tensor([[temperatures[sample]] for _, sample in batch]), self._uniform(batch))
        new_ids = self._generate([self._prompt_ids[prompt] for prompt, _ in batch], draw, len(temperatures))
        return self._generations(batch, new_ids, draw)

    def _uniform(self, batch: Sequence[tuple[int, int]]) -> np.ndarray:
        """The random numbers of a batch, `[responses, max_new_tokens]`."""
        steps = self._max_new_tokens
        return np.stack(
            [uniforms(self._seed, self._prompt_ids[i], self._occurrences[i], sample, steps) for i, sample in batch]
        )

    def _generate(self, prompts: list[Sequence[int]], draw: _Draw, samples: int = 1) -> list[list[int]]:
        """New tokens; with several `samples` each prompt stands that often in a row, and is read once."""
        try:
            if samples > 1 and not self.together and _keeps_prompts(self.inner):
                return _continue_once(self.inner, prompts[::samples], samples, self.config, self.device, draw)
            return _generate_batch(self.inner, prompts, self.config, self.device, draw, self.together)
        except torch.OutOfMemoryError:
            longest = max(map(len, prompts)) + self._max_new_tokens
            raise UserError(
                f"{len(prompts)} responses at once, of up to {longest} tokens with their prompts, do not fit into "
                f"the memory of {self.device}: set eval.batch_size to a lower number"
            ) from None

    def _generations(
        self, batch: Sequence[tuple[int, int]], new_ids: Sequence[list[int]], draw: _Draw
    ) -> list[Generation]:
        generated = []
        for (prompt, sample), ids, logps in zip(batch, new_ids, draw.logps(), strict=True):
            ids, ended = until_stop(ids, self.stops)
            generated.append(Generation(prompt, sample, ids, ended, logps[: len(ids)]))
        return generated


@contextmanager
def prompt_sampler(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    *,
    temperatures: Sequence[float],
    max_new_tokens: int,
    seed: int = 0,
) -> Iterator[Callable[[Sequence[int]], list[Generation]]]:
    """A function that answers prompts, given by their numbers: `len(temperatures)` responses to each.

    The model reads each prompt once for all of its responses, unless it keeps a recurrent state (`_keeps_prompts`).
    Random numbers are those of `generate_responses`, so a response does not depend on the batch.

    Args:
        prompt_ids: all prompts, as for `generate_responses`.
        temperatures: of each response to a prompt. 0 only if all are 0.

    Raises:
        ValueError: a prompt without a token, or a number out of range.
    """
    if not temperatures or max_new_tokens < 1 or min(temperatures) < 0 or (min(temperatures) == 0 < max(temperatures)):
        raise ValueError("expected temperatures above 0 (or 0 for all), and max_new_tokens of at least 1")
    sampler = _Sampler(model, tokenizer, prompt_ids, max_new_tokens, 1.0, seed, None)
    with _undisturbed(model, sampler.inner, sampler.config):
        yield lambda numbers: sampler.sample_prompts(numbers, temperatures)


def responses_at_once(longest: int, device: torch.device | str) -> int:
    """Responses per batch, at least 1, where the longest response has `longest` tokens with its prompt."""
    return max(1, TOKENS_AT_ONCE.get(torch.device(device).type, 4096) // longest)


def _occurrences(prompt_ids: Sequence[Sequence[int]]) -> list[int]:
    """Number of equal prompts before each prompt, so that equal prompts draw different numbers."""
    seen: Counter[tuple[int, ...]] = Counter()
    numbers = []
    for ids in map(tuple, prompt_ids):
        numbers.append(seen[ids])
        seen[ids] += 1
    return numbers


def uniforms(seed: int, prompt: Sequence[int], occurrence: int, sample: int, steps: int) -> np.ndarray:
    """The random numbers of one response, `[steps]` float64 in [0, 1)."""
    # The length keeps a prompt's key from being the beginning of another's.
    return np.random.default_rng([seed, sample, occurrence, len(prompt), *prompt]).random(steps)


def draw_tokens(probabilities: torch.Tensor, uniform: np.ndarray) -> torch.Tensor:
    """Draw one entry of each row by inverting its cumulative distribution function.

    PyTorch's multinomial draws an exponential for every entry of the vocabulary: 110 ms for 84 rows of 49,152 on two
    CPU cores, a sixth of the time of sampling from SmolLM2. One number per row, searched first among the sums of blocks
    and then within a block, takes 2 ms. Sums are float64 on the host: some devices (MPS) have no float64.

    Args:
        probabilities: `[rows, V]`, not negative; they need not sum to one.
        uniform: `[rows]`, float64, in [0, 1).

    Returns:
        `[rows]` indices, each with a probability above zero.

    >>> draw_tokens(torch.tensor([[0.5, 0.0, 0.5], [0.5, 0.0, 0.5]]), np.array([0.4, 0.6])).tolist()
    [0, 2]
    """
    rows, vocabulary = probabilities.shape
    blocks = torch.nn.functional.pad(probabilities, (0, -vocabulary % _BLOCK)).view(rows, -1, _BLOCK)
    shares = np.asarray(blocks.sum(dim=-1).float().cpu(), np.float64)
    at = np.asarray(uniform, np.float64)[:, None] * shares.sum(-1, keepdims=True)
    block = _passes(shares, at)
    before = np.take_along_axis(shares.cumsum(-1) - shares, block, -1)
    row = torch.arange(rows, device=blocks.device)
    inner = blocks[row, torch.from_numpy(block[:, 0]).to(blocks.device)]
    drawn = block * _BLOCK + _passes(np.asarray(inner.float().cpu(), np.float64), at - before)
    return torch.from_numpy(drawn[:, 0]).to(blocks.device)


def _passes(weights: np.ndarray, at: np.ndarray) -> np.ndarray:
    """First entry of each row whose cumulative weight is above `at`; the last one with a weight if none is."""
    cumulative = weights.cumsum(-1)
    # An entry without weight repeats the sum before it, so the first to reach the total is the last with a weight.
    last = (cumulative < cumulative[:, -1:]).sum(-1, keepdims=True)
    return np.minimum((cumulative <= at).sum(-1, keepdims=True), last)


class _Draw(LogitsProcessor):
    """Draw each row's next token, keep its log-probability, and set its score to infinity in place."""

    def __init__(self, temperature: float | torch.Tensor, uniform: np.ndarray):
        self.temperature = temperature  # a tensor: [rows, 1]
        self.greedy = not (temperature.any() if isinstance(temperature, torch.Tensor) else temperature)
        self.uniform = uniform  # [rows, steps]
        self._steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Few passes over the scores: with a wide vocabulary each takes a hundredth of a step.
        highest = scores.amax(dim=-1, keepdim=True)
        weights = (scores - highest).exp_()
        total = highest + weights.sum(dim=-1, keepdim=True).log_()
        if not torch.isfinite(total).all():
            raise NonFiniteError("the model's logits are not finite, so no token can be drawn; check its weights")
        if not self.greedy:
            if isinstance(self.temperature, torch.Tensor):
                weights = ((scores - highest) / self.temperature.to(scores)).exp_()
            elif self.temperature != 1:
                weights = ((scores - highest) / self.temperature).exp_()
            drawn = draw_tokens(weights, self.uniform[:, len(self._steps)])[:, None]
        else:
            drawn = scores.argmax(dim=-1, keepdim=True)
        self._steps.append(scores.gather(-1, drawn) - total)
        return scores.scatter_(-1, drawn, torch.inf)

    def logps(self) -> list[list[float]]:
        """Log-probabilities of the drawn tokens by row, including tokens after the end of a response."""
        return torch.cat(self._steps, dim=-1).tolist()


def _plain_config(tokenizer: PreTrainedTokenizerBase, stops: list[int], max_new_tokens: int) -> GenerationConfig:
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = stops[0] if stops else 0
    return GenerationConfig(
        do_sample=False,  # takes the token that _Draw gave the highest score
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=pad,
        use_cache=True,
    )


@contextmanager
def _undisturbed(model: torch.nn.Module, inner: Any, config: GenerationConfig) -> Iterator[None]:
    """Context with evaluation mode and `config` as the model's generation settings; it restores both.

    Transformers fills unset fields of a generation config from the model's, so only replacing the model's config keeps
    its settings out.
    """
    training, saved = model.training, inner.generation_config
    model.eval()
    inner.generation_config = config
    try:
        # Gathered weights of a sharded model stay for the next forward, which could not use inference-mode tensors.
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
    # synced_gpus: a process whose responses have ended continues until those of all processes have.
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
    """Generate new tokens for each prompt. The first `shared` tokens are read once; each row's padding follows them.

    shared shared  pad  pad  own  own | new new
    shared shared  own  own  own  own | new new
    """
    input_ids, attention_mask = padded(prompts, shared, config.pad_token_id, device)
    if shared:
        cache = DynamicCache(config=model.config)
        model(input_ids=input_ids[:1, :shared], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(prompts))
        options["past_key_values"] = cache
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        logits_processor=LogitsProcessorList([processor]),
        **options,
    )
    return output[:, input_ids.shape[1] :].tolist()


def padded(
    prompts: Sequence[Sequence[int]], shared: int, pad: int | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, `[prompts, longest]`; each row's padding follows its first `shared` tokens."""
    longest = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), longest), pad or 0, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        for place, part in ((0, ids[:shared]), (longest - len(ids) + shared, ids[shared:])):
            input_ids[row, place : place + len(part)] = torch.tensor(part)
            attention_mask[row, place : place + len(part)] = 1
    return input_ids.to(device), attention_mask.to(device)


def _continue_once(
    model: Any,
    prompts: Sequence[Sequence[int]],
    samples: int,
    config: GenerationConfig,
    device: torch.device,
    draw: _Draw,
) -> list[list[int]]:
    """`samples` responses to each prompt. One pass reads the prompts and gives the logits of all first tokens."""
    input_ids, attention_mask = padded(prompts, 0, config.pad_token_id, device)
    cache = DynamicCache(config=model.config)
    known = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0), "logits_to_keep": 1}
    options = {name: value for name, value in options.items() if name in known}
    output = model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **options)
    input_ids, attention_mask = (part.repeat_interleave(samples, 0) for part in (input_ids, attention_mask))
    logits = output.logits[:, -1].to(dtype=torch.float32).repeat_interleave(samples, 0)
    first = draw(input_ids, logits).argmax(-1, keepdim=True)
    prompt_length, new = input_ids.shape[1], int(config.max_new_tokens or 1)
    if new == 1:
        return first.tolist()
    cache.batch_repeat_interleave(samples)
    output = model.generate(
        input_ids=torch.cat([input_ids, first], -1),
        attention_mask=torch.cat([attention_mask, torch.ones_like(first)], -1),
        logits_processor=LogitsProcessorList([draw]),
        past_key_values=cache,
        max_new_tokens=new - 1,
    )
    return output[:, prompt_length:].tolist()


def _keeps_prompts(model: Any) -> bool:
    """Whether a model keeps keys and values alone (no recurrent state), which all samples of a prompt can continue."""
    kept = (DynamicLayer, DynamicSlidingWindowLayer)
    return all(type(layer) in kept for layer in DynamicCache(config=model.config).layers)


def _shared_start(prompts: Sequence[Sequence[int]]) -> int:
    """Number of common first tokens, less than the shortest prompt; 0 where reading them once is not worth it.

    A chat template begins every conversation with the same system message: half of a typical prompt of SmolLM2.
    """
    most = min(map(len, prompts)) - 1
    number = next((i for i in range(most) if any(ids[i] != prompts[0][i] for ids in prompts)), most)
    return number if len(prompts) > 1 and number >= _LEAST_SHARED else 0


def _reads_start_once(
    model: Any, prompts: Sequence[Sequence[int]], shared: int, config: GenerationConfig, device: torch.device
) -> bool:
    """Whether a model gives the same results when the prompts' start is read once, with padding behind it.

    A window of attention or a recurrent state would count the padding, and rotary frequencies that depend on the input
    would be wrong. The config rules some models out; others are tried once: a long and a short prompt, both ways, two
    tokens. The model keeps the answer.
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
            logps = []
            for start in (shared, 0):
                recorder = _LogpRecorder(whole[-1])
                _continue(model, probe, start, config, device, recorder, max_new_tokens=2)
                logps.append(torch.stack(recorder.logps))
            tolerance = 2e-3 if computes_exactly(model) and logps[0].dtype.itemsize >= 4 else 0.25
            good = bool((logps[0] - logps[1]).abs().max() < tolerance)
        except (RuntimeError, TypeError, ValueError, AttributeError):  # the forward does not take this cache
            good = False
    model.sepo_reads_start_once = good
    return good


def computes_exactly(model: torch.nn.Module) -> bool:
    """Whether a model's forward is computed in float32 or wider.

    Under autocast, or wrapped by Accelerate for mixed precision, it is not, even if weights and logits are float32.
    """
    wide = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
    kind = next(model.parameters()).device.type
    return wide and not hasattr(model, "_original_forward") and not torch.is_autocast_enabled(kind)


class _LogpRecorder(LogitsProcessor):
    """Record the log-probabilities of every step and always continue with the same token."""

    def __init__(self, token: int):
        self.token = token
        self.logps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logps.append(scores.log_softmax(-1))
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.token] = 0.0
        return forced


def until_stop(ids: list[int], stops: list[int]) -> tuple[list[int], bool]:
    """(tokens up to the first stop token, whether there is one)."""
    for index, token in enumerate(ids):
        if token in stops:
            return ids[: index + 1], True
    return ids, False
