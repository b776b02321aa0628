"""Answers to a file of questions, by a model here, by vLLM or behind a server: resumable, in the benchmark's own form.

Every finished turn is a line of `finished.jsonl`, written and flushed when it is there, so that a command that is
killed goes on where it stopped; a line that was cut off is written again. What answers depend on stands beside it
(`generate.json`), and a folder with answers of other settings is refused. When nothing remains, the answers are written
in the form that the benchmark's own tools read.

The questions of a conversation are asked turn by turn. With Transformers each prompt has random numbers of its own
(`generate.py`), so neither the batch nor where a run was interrupted changes an answer, up to the rounding of the
model's sums.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sepo.bars import progress_bar
from sepo.errors import UserError, one_line
from sepo.files import append_line, digest, grown_lines, write_json, write_text
from sepo.judging.endpoint import Endpoint, Reply, Spent
from sepo.judging.questions import Question, answer_row, temperature_of

FINISHED, RECORD = "finished.jsonl", "generate.json"
_AT_ONCE = 512  # prompts that vLLM is given at once: it batches by itself, and hands them over when all are done


class Turn(NamedTuple):
    """An answer to one turn: its text, its length in tokens, whether the model ended it itself (None: not known)."""

    text: str
    tokens: int
    finished: bool | None = None


class Job(NamedTuple):
    """A turn that is to be answered: of which question, its number from 0, the conversation so far, how to sample."""

    key: str
    turn: int
    messages: tuple[Mapping[str, str], ...]
    temperature: float


# An engine answers jobs and hands on each answer as it comes; what it cannot answer it leaves out.
Done = Callable[[Job, Turn], None]
Engine = Callable[[Sequence[Job], Done], None]


@dataclass
class AnswerLog:
    """The turns that are answered, in a file that grows by lines.

    Attributes:
        path: of the file.
        turns: by question and turn.
    """

    path: Path
    turns: dict[tuple[str, int], Turn] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> AnswerLog:
        """What an earlier run left."""
        found = cls(path)
        for row in grown_lines(path):
            try:
                turn = Turn(str(row["text"]), int(row["tokens"]), row["finished"])
                found.turns[(str(row["key"]), int(row["turn"]))] = turn
            except (ValueError, KeyError, TypeError):
                continue  # a damaged line is a turn that is answered again
        return found

    def add(self, job: Job, turn: Turn) -> None:
        """Keep an answer: it is on the disk when this returns."""
        self.turns[(job.key, job.turn)] = turn
        append_line(self.path, {"key": job.key, "turn": job.turn, **turn._asdict()})


def settle(folder: Path, record: Mapping[str, Any]) -> None:
    """See that what lies in a folder was made with these settings, and write them down.

    Raises:
        UserError: it holds answers of others, by the name of the first setting that differs.
    """
    path = folder / RECORD
    if path.is_file():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))["settings"]
        except (ValueError, KeyError, TypeError):
            earlier = {}
        wanted = json.loads(json.dumps(record))
        for name in wanted:
            if earlier.get(name) != wanted[name]:
                what = f"with {name} {earlier.get(name)!r}, not {wanted[name]!r}"
                what = {"model": "of another model", "prompts": "to other questions"}.get(name, what)
                raise UserError(f"'{folder}' holds answers {one_line(what, 150)}: choose another --out, or remove it")
    elif (folder / FINISHED).is_file():
        raise UserError(f"'{folder}' holds {FINISHED} without {RECORD}: choose another --out")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"settings": record})


def questions_digest(questions: Sequence[Question]) -> str:
    """Fingerprint of what is asked."""
    return digest([[question.key, question.turns] for question in questions])


def answer_all(
    questions: Sequence[Question], benchmark: str, finished: AnswerLog, engine: Engine, temperature: float | None
) -> int:
    """Answer what is not answered yet, turn by turn; returns how many questions remain without a whole answer."""
    longest = max(len(question.turns) for question in questions)
    total = sum(len(question.turns) for question in questions)
    with progress_bar(True, total=total, initial=len(finished.turns), desc="answer", unit="turn") as bar:

        def take(job: Job, answered: Turn) -> None:
            finished.add(job, answered)
            bar.update()

        for turn in range(longest):
            jobs = []
            for question in questions:
                done = [finished.turns.get((question.key, earlier)) for earlier in range(turn)]
                if turn < len(question.turns) and (question.key, turn) not in finished.turns and None not in done:
                    messages = _conversation(question, [one.text for one in done if one is not None])
                    heat = temperature_of(question, benchmark, temperature)
                    jobs.append(Job(question.key, turn, messages, heat))
            if jobs:
                engine(jobs, take)
    return sum(not is_whole(question, finished) for question in questions)


def is_whole(question: Question, finished: AnswerLog) -> bool:
    """Are all turns of a question answered?"""
    return all((question.key, turn) in finished.turns for turn in range(len(question.turns)))


def _conversation(question: Question, answers: Sequence[str]) -> tuple[Mapping[str, str], ...]:
    messages: list[Mapping[str, str]] = []
    for number, text in enumerate(question.turns[: len(answers) + 1]):
        messages.append({"role": "user", "content": text})
        if number < len(answers):
            messages.append({"role": "assistant", "content": answers[number]})
    return tuple(messages)


def write_answers(folder: Path, questions: Sequence[Question], benchmark: str, finished: AnswerLog, model: str) -> Path:
    """Write the whole answers in the benchmark's form; returns the file."""
    rows = []
    for question in questions:
        if is_whole(question, finished):
            turns = [finished.turns[(question.key, turn)] for turn in range(len(question.turns))]
            texts, tokens = [turn.text for turn in turns], [turn.tokens for turn in turns]
            rows.append(answer_row(question, texts, tokens, model, benchmark))
    if benchmark in ("mt_bench", "arena_hard"):
        path = folder / "model_answer" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', model)}.jsonl"
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        path = folder / "model_outputs.json"
        write_json(path, rows)
    return path


# --- engines --------------------------------------------------------------------------------------------------------


def transformers_engine(
    model: Any, tokenizer: Any, *, max_new_tokens: int, seed: int, batch_size: int | None = None, options: Mapping = {}
) -> Engine:
    """A model in memory. Prompts are sorted by length and answered in batches of a token budget (`generate.py`)."""
    from sepo.data.prompts import encode_prompts
    from sepo.evaluate.generate import generate_responses, responses_at_once
    from sepo.models.limits import model_limits

    limits = model_limits(model.get_base_model() if hasattr(model, "get_base_model") else model)
    device = next(model.parameters()).device

    def run(jobs: Sequence[Job], done: Done) -> None:
        ids = encode_prompts([job.messages for job in jobs], tokenizer, options)
        check_fits(ids, max_new_tokens, limits)
        for temperature in dict.fromkeys(job.temperature for job in jobs):
            order = [i for i, job in enumerate(jobs) if job.temperature == temperature]
            order.sort(key=lambda i: -len(ids[i]))
            while order:
                number = batch_size or responses_at_once(len(ids[order[0]]) + max_new_tokens, device)
                batch, order = order[:number], order[number:]
                found = generate_responses(
                    model,
                    tokenizer,
                    [ids[i] for i in batch],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    seed=seed,
                    batch_size=len(batch),
                    progress=False,
                )
                for i, one in zip(batch, found, strict=True):
                    text = str(tokenizer.decode(one.response_ids, skip_special_tokens=True)).strip()
                    done(jobs[i], Turn(text, len(one.response_ids), one.finished))

    return run


def check_fits(prompts: Sequence[Sequence[int]], max_new_tokens: int, limits: Any) -> None:
    """Raise a UserError for prompts to which a model with a table of positions, or with fewer ids, cannot answer."""
    longest = max(map(len, prompts))
    if limits.positions is not None and limits.firm and longest + max_new_tokens > limits.positions:
        raise UserError(
            f"a prompt has {longest} tokens, and with {max_new_tokens} new ones that is more than the "
            f"{limits.positions} positions of the model: lower --max-new-tokens"
        )
    if (largest := max(map(max, prompts))) >= limits.vocabulary:
        raise UserError(f"a prompt holds the token {largest}, but the model has {limits.vocabulary} embeddings")


def server_engine(endpoint: Endpoint, *, max_new_tokens: int, seed: int, spent: list[Spent]) -> Engine:
    """A server of the OpenAI kind. What was answered once comes from the cache of replies."""

    def run(jobs: Sequence[Job], done: Done) -> None:
        requests = [
            endpoint.request(
                job.messages, temperature=job.temperature, max_tokens=max_new_tokens, seed=own_seed(seed, job.messages)
            )
            for job in jobs
        ]

        def take(number: int, reply: Reply) -> None:
            # A model may have nothing to say.
            if reply.failure is None or reply.failure == "empty reply":
                done(jobs[number], Turn(reply.text.strip(), reply.usage[1]))

        _, paid = endpoint.ask_all(requests, "ask", take)
        spent.append(paid)

    return run


def vllm_engine(
    folder: str, tokenizer: Any, *, max_new_tokens: int, seed: int, options: Mapping = {}, adapter: str | None = None
) -> Engine:
    """A model in vLLM, which batches by itself. Its prompts are the same ids that Transformers would be given.

    Args:
        folder: of the model; of the adapter's base, where there is an adapter.
        adapter: folder of a LoRA adapter.

    Raises:
        UserError: vLLM is not installed.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        raise UserError("--engine vllm needs the package vllm: run `pip install vllm`, or leave it out") from None
    from transformers import AutoConfig, GenerationConfig

    from sepo.data.prompts import encode_prompts
    from sepo.data.templates import stop_ids

    class _Ends:
        config = AutoConfig.from_pretrained(folder)
        generation_config: Any = None

    if os.path.isfile(os.path.join(folder, "generation_config.json")):
        _Ends.generation_config = GenerationConfig.from_pretrained(folder)
    stops = stop_ids(_Ends, tokenizer)
    lora: dict[str, Any] = {} if adapter is None else {"enable_lora": True, "max_lora_rank": _rank(adapter)}
    # The saved sampling settings are put aside here too.
    llm = LLM(model=folder, seed=seed, generation_config="vllm", **lora)
    request: dict[str, Any] = {}
    if adapter is not None:
        from vllm.lora.request import LoRARequest

        request["lora_request"] = LoRARequest("policy", 1, adapter)

    def run(jobs: Sequence[Job], done: Done) -> None:
        ids = encode_prompts([job.messages for job in jobs], tokenizer, options)
        settings = [
            SamplingParams(
                temperature=job.temperature,
                max_tokens=max_new_tokens,
                seed=own_seed(seed, list(prompt)),
                stop_token_ids=stops,
            )
            for job, prompt in zip(jobs, ids, strict=True)
        ]
        for start in range(0, len(jobs), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            prompts = [{"prompt_token_ids": list(prompt)} for prompt in ids[part]]
            found = llm.generate(prompts, settings[part], **request)
            for job, output in zip(jobs[part], found, strict=True):
                one = output.outputs[0]
                text = str(tokenizer.decode(list(one.token_ids), skip_special_tokens=True)).strip()
                done(job, Turn(text, len(one.token_ids), one.finish_reason == "stop"))

    return run


def own_seed(seed: int, prompt: Any) -> int:
    """A seed of 31 bits that belongs to a prompt: with one for all, a server draws the same numbers for each."""
    return int(digest([seed, prompt]), 16) % 2**31


def _rank(adapter: str) -> int:
    try:
        return max(8, int(json.loads(Path(adapter, "adapter_config.json").read_text(encoding="utf-8"))["r"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"the adapter '{adapter}' is no LoRA that vLLM can load: merge it into its base") from None


def total_spent(parts: Sequence[Spent]) -> Spent:
    """All of it together."""
    sums = {name: sum(asdict(part)[name] for part in parts) for name in asdict(Spent())}
    return Spent(**sums)
