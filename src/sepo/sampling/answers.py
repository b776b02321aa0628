"""Several sampled answers to each prompt, by a model in memory, by vLLM or by a server; resumable by prompt.

With Transformers the model reads each prompt once for all of its answers, and each answer has its own random numbers
(`sepo.evaluate.generate`), so neither the batch nor an interruption changes an answer. vLLM and servers get a seed for
each answer; how they share a prompt is theirs (vLLM: its prefix cache).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from sepo.bars import progress_bar
from sepo.evaluate.generate import Generation, prompt_sampler, responses_at_once
from sepo.files import digest
from sepo.judging.answering import Engine, Job, Turn, check_fits, local_turn
from sepo.judging.prompts import encode_prompts
from sepo.models.adapters import causal_lm
from sepo.models.limits import model_limits
from sepo.sampling.prompts import Prompt
from sepo.sampling.responses import CUT, NONE, STOP, UNKNOWN, Answers, Grown

_AT_ONCE = 64  # prompts of one call of vLLM or a server


class How(NamedTuple):
    """How answers are sampled: a temperature for each answer to a prompt, their length limit, and the seed."""

    temperatures: tuple[float, ...]
    max_new_tokens: int = 256
    seed: int = 0

    def key(self) -> dict[str, Any]:
        """As the record of a folder and the card name them."""
        return {
            "samples": len(self.temperatures),
            "temperatures": list(self.temperatures),
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
        }


# Answers the prompts with these numbers, and passes on the answers to each batch of prompts.
Take = Callable[[Mapping[int, Answers]], None]
Source = Callable[[Sequence[int], Take], None]


def sample_all(prompts: Sequence[Prompt], source: Callable[[], Source], grown: Grown) -> list[Answers | None]:
    """Answers to all prompts; those of an earlier attempt are reused. None where a server gave no answer.

    Args:
        source: makes what answers, if there is anything to answer: loading a model is expensive.
        grown: keeps the answers of each prompt.
    """
    keys = [digest(prompt.key()) for prompt in prompts]
    left = [i for i, key in enumerate(keys) if key not in grown.values]
    if left:
        done = len(prompts) - len(left)
        with progress_bar(True, total=len(prompts), initial=done, desc="sample", unit="prompt") as bar:

            def take(batch: Mapping[int, Answers]) -> None:
                grown.add({keys[i]: list(answers) for i, answers in batch.items()})
                bar.update(len(batch))

            source()(left, take)
    return [Answers(*grown.values[key]) if key in grown.values else None for key in keys]


def transformers_source(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    how: How,
    *,
    batch_size: int | None = None,
    options: Mapping[str, Any] = {},
) -> Source:
    """A model in memory.

    Args:
        batch_size: answers at a time; None for the budget of `generate.py`. A prompt's answers stay together.
        options: keywords for the chat template.

    Raises:
        UserError: a prompt cannot be rendered, or is too long.
    """
    ids = prompt_ids(prompts, tokenizer, options)
    inner = causal_lm(model)
    check_fits(ids, how.max_new_tokens, model_limits(inner))
    device = next(inner.parameters()).device
    samples = len(how.temperatures)

    def run(numbers: Sequence[int], take: Take) -> None:
        # Batches are those of all prompts, so that a resumed command has the batches of an undisturbed one.
        order, wanted = sorted(range(len(ids)), key=lambda i: -len(ids[i])), set(numbers)
        with prompt_sampler(
            model, tokenizer, ids, temperatures=how.temperatures, max_new_tokens=how.max_new_tokens, seed=how.seed
        ) as sample:
            while order:
                at_once = batch_size or responses_at_once(len(ids[order[0]]) + how.max_new_tokens, device)
                width = max(1, at_once // samples)
                batch, order = [i for i in order[:width] if i in wanted], order[width:]
                if batch:
                    generated = sample(batch)
                    parts = [generated[i : i + samples] for i in range(0, len(generated), samples)]
                    take({i: _local(tokenizer, ids[i], part) for i, part in zip(batch, parts, strict=True)})

    return run


def prompt_ids(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] = {}
) -> list[list[int]]:
    """Token ids of the prompts: those that they have, else those of their messages."""
    open_prompts = [i for i, prompt in enumerate(prompts) if prompt.ids is None]
    encoded = encode_prompts([prompts[i].messages for i in open_prompts], tokenizer, options) if open_prompts else []
    made = dict(zip(open_prompts, encoded, strict=True))
    return [list(prompt.ids) if prompt.ids is not None else made[i] for i, prompt in enumerate(prompts)]


def _local(tokenizer: Any, prompt: Sequence[int], generated: Sequence[Generation]) -> Answers:
    turns = [local_turn(tokenizer, prompt, one.response_ids, one.finished) for one in generated]
    ids, logps = [list(one.response_ids) for one in generated], [list(one.logps) for one in generated]
    return _answers(turns, ids, logps)


def _answers(turns: Sequence[Turn], ids: list[list[int]], logps: list[list[float]]) -> Answers:
    return Answers([turn.text for turn in turns], [_end(turn) for turn in turns], [t.tokens for t in turns], ids, logps)


def _end(turn: Turn) -> str:
    if turn.failure is not None or not turn.text:
        return NONE
    return UNKNOWN if turn.finished is None else STOP if turn.finished else CUT


def engine_source(engine: Engine, prompts: Sequence[Prompt], how: How) -> Source:
    """vLLM or a server: an engine of `sepo.judging.answering`.

    A prompt counts as answered when each of its answers has come, or is known to be none; a server's missing reply
    leaves the prompt open, and the same command asks again.
    """
    samples = len(how.temperatures)

    def run(numbers: Sequence[int], take: Take) -> None:
        for start in range(0, len(numbers), _AT_ONCE):
            batch = numbers[start : start + _AT_ONCE]
            jobs = [
                Job(str(i), 0, prompts[i].messages, how.temperatures[sample], sample)
                for i in batch
                for sample in range(samples)
            ]
            turns: dict[int, dict[int, Turn]] = defaultdict(dict)

            def take_turn(job: Job, turn: Turn, turns: dict[int, dict[int, Turn]] = turns) -> None:
                turns[int(job.key)][job.sample] = turn

            engine(jobs, take_turn)
            whole = {i: [turns[i][sample] for sample in range(samples)] for i in batch if len(turns[i]) == samples}
            if whole:
                none: list[Any] = [[] for _ in range(samples)]
                take({i: _answers(found, none, none) for i, found in whole.items()})

    return run
