"""Answers to a file of questions, by a local model, by vLLM or by a server: resumable, in the benchmark's own format.

Every finished turn is a line of `finished.jsonl`, flushed at once, so a killed command continues after the last whole
line. `generate.json` records the settings, and a folder with answers for other settings is refused. The finished
answers are written in a format that the benchmark's own tools read.

The questions of a conversation are asked turn by turn. With Transformers each prompt has its own random numbers
(`generate.py`), so neither batching nor an interruption changes an answer, up to floating-point rounding.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from sepo.bars import progress_bar
from sepo.data.thinking import answer_of
from sepo.errors import UserError, one_line
from sepo.files import append_line, digest, grown_lines, write_json, write_text
from sepo.judging.endpoint import Endpoint
from sepo.judging.questions import Question, answer_row, temperature_of
from sepo.judging.replies import NO_END, Reply, Spent

FINISHED, RECORD = "finished.jsonl", "generate.json"
_AT_ONCE = 512  # prompts of one vLLM call, which batches them by itself and returns when all are answered


class Turn(NamedTuple):
    """The answer to one turn.

    Attributes:
        text: of the answer.
        tokens: its length.
        finished: the model ended it, rather than the length limit; None if unknown.
        failure: why a local model has no answer, which it would not have again; None for an answer.
    """

    text: str
    tokens: int
    finished: bool | None = None
    failure: str | None = None


class Job(NamedTuple):
    """A turn to answer.

    Attributes:
        key: of the question.
        turn: number of the turn, from 0.
        messages: the conversation so far.
        temperature: of sampling.
        sample: number of the answer, where a question has several.
    """

    key: str
    turn: int
    messages: tuple[Mapping[str, Any], ...]
    temperature: float
    sample: int = 0


# An engine answers jobs and passes each answer on as it comes. It skips a job that it cannot answer.
Done = Callable[[Job, Turn], None]
Engine = Callable[[Sequence[Job], Done], None]


@dataclass
class AnswerLog:
    """The finished turns, in a file that grows by lines.

    Attributes:
        path: of the file.
        turns: by key of the question and number of the turn.
    """

    path: Path
    turns: dict[tuple[str, int], Turn] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> AnswerLog:
        """Read the turns of an earlier run."""
        log = cls(path)
        for row in grown_lines(path):
            try:
                turn = Turn(str(row["text"]), int(row["tokens"]), row["finished"], row.get("failure"))
                log.turns[(str(row["key"]), int(row["turn"]))] = turn
            except (ValueError, KeyError, TypeError):
                continue  # the turn of a damaged line is answered again
        return log

    def add(self, job: Job, turn: Turn) -> None:
        """Store an answer on disk."""
        self.turns[(job.key, job.turn)] = turn
        append_line(self.path, {"key": job.key, "turn": job.turn, **turn._asdict()})


def claim_folder(folder: Path, record: Mapping[str, Any], name: str = RECORD, answers: str = FINISHED) -> None:
    """Record the settings of the answers in a folder, or check that they are the recorded ones.

    Args:
        name: of the file with the settings.
        answers: name of the file with the answers.

    Raises:
        UserError: the folder has answers with other settings; names the first setting that differs.
    """
    path = folder / name
    if path.is_file():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))["settings"]
        except (ValueError, KeyError, TypeError):
            earlier = {}
        wanted = json.loads(json.dumps(record))
        for setting in wanted:
            if earlier.get(setting) != wanted[setting]:
                kind = f"with {setting} {earlier.get(setting)!r}, not {wanted[setting]!r}"
                kind = {"model": "of another model", "prompts": "to other questions"}.get(setting, kind)
                raise UserError(f"'{folder}' holds answers {one_line(kind, 150)}: choose another --out, or remove it")
    elif (folder / answers).is_file():
        raise UserError(f"'{folder}' holds {answers} without {name}: choose another --out")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"settings": record})


def questions_digest(questions: Sequence[Question]) -> str:
    """Fingerprint of the questions."""
    return digest([[question.key, question.turns] for question in questions])  # a key holds the given messages


def answer_all(
    questions: Sequence[Question], benchmark: str, finished: AnswerLog, engine: Engine, temperature: float | None
) -> int:
    """Answer the open questions turn by turn; returns the number of questions still without a whole answer.

    Args:
        temperature: of sampling; None for the benchmark's.
    """
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
                known = all(answer is not None and answer.failure is None for answer in done)
                if turn < len(question.turns) and (question.key, turn) not in finished.turns and known:
                    messages = _conversation(question, [answer.text for answer in done if answer is not None])
                    own_temperature = temperature_of(question, benchmark, temperature)
                    jobs.append(Job(question.key, turn, messages, own_temperature))
            if jobs:
                engine(jobs, take)
    return sum(not is_whole(question, finished) for question in questions)


def is_whole(question: Question, finished: AnswerLog) -> bool:
    """Whether all turns of a question are answered."""
    turns = [finished.turns.get((question.key, turn)) for turn in range(len(question.turns))]
    return all(turn is not None and turn.failure is None for turn in turns)


def failure_of(question: Question, finished: AnswerLog) -> str | None:
    """Why a local model has no whole answer to a question; None for an answer and for an open question."""
    turns = [finished.turns.get((question.key, turn)) for turn in range(len(question.turns))]
    return next((turn.failure for turn in turns if turn is not None and turn.failure is not None), None)


def is_open(question: Question, finished: AnswerLog) -> bool:
    """Whether a question is still to be asked."""
    return not is_whole(question, finished) and failure_of(question, finished) is None


def _conversation(question: Question, answers: Sequence[str]) -> tuple[Mapping[str, Any], ...]:
    messages: list[Mapping[str, Any]] = list(question.context)
    for number, text in enumerate(question.turns[: len(answers) + 1]):
        messages.append({"role": "user", "content": text})
        if number < len(answers):
            messages.append({"role": "assistant", "content": answers[number]})
    return tuple(messages)


def write_answers(folder: Path, questions: Sequence[Question], benchmark: str, finished: AnswerLog, model: str) -> Path:
    """Write the whole answers in the benchmark's format; returns the file."""
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
    """An engine that is a model in memory. Prompts are sorted by length and batched within a token budget.

    Args:
        batch_size: None for the budget of `generate.py`.
        options: keywords for the chat template.
    """
    from sepo.evaluate.generate import generate_responses
    from sepo.judging.prompts import encode_prompts
    from sepo.models.limits import model_limits

    limits = model_limits(model.get_base_model() if hasattr(model, "get_base_model") else model)
    device = next(model.parameters()).device

    def run(jobs: Sequence[Job], done: Done) -> None:
        ids = encode_prompts([job.messages for job in jobs], tokenizer, options)
        check_fits(ids, max_new_tokens, limits)
        for temperature, batch in _batches(jobs, ids, max_new_tokens, batch_size, device.type):
            responses = generate_responses(
                model,
                tokenizer,
                [ids[i] for i in batch],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                batch_size=len(batch),
                progress=False,
            )
            for i, response in zip(batch, responses, strict=True):
                done(jobs[i], local_turn(tokenizer, ids[i], response.response_ids, response.finished))

    return run


def _batches(
    jobs: Sequence[Job], ids: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int | None, device: str
) -> Iterator[tuple[float, list[int]]]:
    """The temperature and the jobs of each batch: sorted by length, within a token budget."""
    from sepo.evaluate.generate import responses_at_once

    for temperature in dict.fromkeys(job.temperature for job in jobs):
        order = [i for i, job in enumerate(jobs) if job.temperature == temperature]
        order.sort(key=lambda i: -len(ids[i]))
        while order:
            number = batch_size or responses_at_once(len(ids[order[0]]) + max_new_tokens, device)
            batch, order = order[:number], order[number:]
            yield temperature, batch


def units_engine(
    model: str,
    tokenizer: Any,
    out: Path,
    *,
    on: Mapping[str, str],
    max_new_tokens: int,
    seed: int,
    batch_size: int | None = None,
    options: Mapping = {},
) -> Engine:
    """`transformers_engine` for a model that the workers of the present engine hold (`judging.units`).

    Args:
        on: device and dtype of the model.
    """
    from sepo.judging.prompts import encode_prompts
    from sepo.judging.units import Answers, read_batches
    from sepo.models.devices import choose_device
    from sepo.models.limits import model_limits
    from sepo.models.names import load_config

    settings = {"model": model, "revision": None, **on, "seed": seed}
    settings["max_new_tokens"] = max_new_tokens

    def run(jobs: Sequence[Job], done: Done) -> None:
        ids = encode_prompts([job.messages for job in jobs], tokenizer, options)
        check_fits(ids, max_new_tokens, model_limits(load_config(model)))
        batches = list(_batches(jobs, ids, max_new_tokens, batch_size, choose_device(on["device"]).type))
        details = [
            (len(batch), {"prompts": [list(map(int, ids[i])) for i in batch], "temperature": temperature})
            for temperature, batch in batches
        ]
        answers = read_batches(Answers, f"answer turn {jobs[0].turn + 1}", settings, details, out)
        for (_, batch), responses in zip(batches, answers, strict=True):
            for i, (response, finished) in zip(batch, responses, strict=True):
                done(jobs[i], local_turn(tokenizer, ids[i], response, finished))

    return run


def local_turn(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int], finished: bool) -> Turn:
    """The answer of a local model, without its thinking."""
    answer = answer_of(tokenizer, ids, prompt)
    if answer is None or not answer.strip():
        return Turn("", len(ids), finished, NO_END if answer is None else "empty answer")
    text = answer.strip()
    if text == str(tokenizer.decode(ids, skip_special_tokens=True)).strip():
        return Turn(text, len(ids), finished)
    return Turn(text, len(tokenizer(text, add_special_tokens=False)["input_ids"]), finished)


def check_fits(prompts: Sequence[Sequence[int]], max_new_tokens: int, limits: Any) -> None:
    """Raise a UserError for prompts beyond a model's table of positions, or with ids beyond its vocabulary."""
    longest = max(map(len, prompts))
    if limits.positions is not None and limits.firm and longest + max_new_tokens > limits.positions:
        raise UserError(
            f"a prompt has {longest} tokens, and with {max_new_tokens} new ones that is more than the "
            f"{limits.positions} positions of the model: lower --max-new-tokens"
        )
    if (largest := max(map(max, prompts))) >= limits.vocabulary:
        raise UserError(f"a prompt holds the token {largest}, but the model has {limits.vocabulary} embeddings")


def server_engine(
    endpoint: Endpoint,
    *,
    max_new_tokens: int,
    seed: int,
    spent: list[Spent],
    failures: Counter[str],
    with_failures: bool = False,
) -> Engine:
    """An engine that is an OpenAI-compatible server, through the cache of replies. It leaves empty answers out.

    Args:
        spent: gets the cost of each call.
        failures: counts the reasons of replies without an answer.
        with_failures: pass on the failure of a question that the server has answered or refused for good.
    """

    def run(jobs: Sequence[Job], done: Done) -> None:
        requests = [
            endpoint.request(
                job.messages,
                temperature=job.temperature,
                max_tokens=max_new_tokens,
                seed=prompt_seed(seed, job.messages, job.sample),
            )
            for job in jobs
        ]

        def take(number: int, reply: Reply) -> None:
            if reply.failure is None:
                done(jobs[number], Turn(reply.text.strip(), reply.tokens, False if reply.cut else None))
            else:
                failures[reply.failure] += 1
                if with_failures and not reply.unanswered:
                    done(jobs[number], Turn("", 0, None, reply.failure))

        _, paid = endpoint.ask_all(requests, "ask", take)
        spent.append(paid)

    return run


def vllm_engine(
    folder: str, tokenizer: Any, *, max_new_tokens: int, seed: int, options: Mapping = {}, adapter: str | None = None
) -> Engine:
    """An engine that is vLLM, which batches by itself. Its prompts have the same ids as with Transformers.

    Args:
        folder: of the model, or of the adapter's base.
        options: keywords for the chat template.
        adapter: folder of a LoRA adapter.

    Raises:
        UserError: vLLM is not installed.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        raise UserError("--engine vllm needs the package vllm: run `pip install vllm`, or leave it out") from None
    from transformers import AutoConfig, GenerationConfig

    from sepo.data.templates import stop_ids
    from sepo.judging.prompts import encode_prompts

    saved = os.path.isfile(os.path.join(folder, "generation_config.json"))
    configs = SimpleNamespace(
        config=AutoConfig.from_pretrained(folder),
        generation_config=GenerationConfig.from_pretrained(folder) if saved else None,
    )
    stops = stop_ids(configs, tokenizer)
    lora: dict[str, Any] = {} if adapter is None else {"enable_lora": True, "max_lora_rank": _rank(adapter)}
    # "vllm": as with Transformers, the sampling settings in the model's folder are ignored.
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
                seed=prompt_seed(seed, list(prompt), job.sample),
                stop_token_ids=stops,
            )
            for job, prompt in zip(jobs, ids, strict=True)
        ]
        for start in range(0, len(jobs), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            prompts = [{"prompt_token_ids": list(prompt)} for prompt in ids[part]]
            outputs = llm.generate(prompts, settings[part], **request)
            for job, prompt, output in zip(jobs[part], ids[part], outputs, strict=True):
                answer = output.outputs[0]
                done(job, local_turn(tokenizer, prompt, list(answer.token_ids), answer.finish_reason == "stop"))

    return run


def prompt_seed(seed: int, prompt: Any, sample: int = 0) -> int:
    """A seed of 31 bits for an answer. With a common seed a server would draw the same numbers for every prompt."""
    return int(digest([seed, prompt, sample] if sample else [seed, prompt]), 16) % 2**31


def _rank(adapter: str) -> int:
    try:
        return max(8, int(json.loads(Path(adapter, "adapter_config.json").read_text(encoding="utf-8"))["r"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"the adapter '{adapter}' is no LoRA that vLLM can load: merge it into its base") from None
