"""`sepo sample`: several answers of a model to each prompt, with scores."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sepo.command import (
    chat_template_option,
    device_options,
    model_option,
    out_option,
    path,
    quiet_libraries,
    template_keywords,
    writing_to,
)
from sepo.errors import UserError, check_number, log_kept_on_interrupt
from sepo.judging.commands.generate import endpoint_of, engine_of, retry_option
from sepo.judging.commands.judge import judge_of, judge_options

if TYPE_CHECKING:
    from sepo.judging.endpoint import Endpoint
    from sepo.judging.replies import Spent
    from sepo.sampling.answers import How, Source
    from sepo.sampling.prompts import Prompt
    from sepo.sampling.scores import Scoring

HELP = "sample several answers to each prompt and score them: a table for `sepo pairs`"
_CONNECTION = ("key_variable", "key_header", "concurrency", "timeout", "retries", "cache")


def add_options(parser: argparse.ArgumentParser) -> None:

    model_option(parser, "--model", "the model that answers; with --server its name")
    parser.add_argument(
        "--prompts", type=path, required=True, metavar="FILE",
        help="prompts: a file, also of preference data; embedded:sentiment, embedded:plain; alpaca_eval, ...",
    )  # fmt: skip
    out_option(parser, "folder for responses.parquet; after an interruption the same command continues")
    parser.add_argument("--samples", type=int, default=8, help="answers to each prompt (default 8)")
    parser.add_argument(
        "--temperature", default="0.7,1.0", metavar="T[,T...]",
        help="sampling temperatures, which the answers to a prompt take in turn (default 0.7,1.0)",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=256, help="length limit of an answer (default 256)")
    parser.add_argument("--limit", type=int, metavar="N", help="answer only the first N prompts")
    chat_template_option(parser)
    parser.add_argument(
        "--engine", choices=["transformers", "vllm"], help="library that runs the model (default transformers)"
    )
    parser.add_argument("--batch-size", type=int, help="answers at a time (default: fits the device)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="dtype of the weights")
    device_options(parser)
    scores = parser.add_argument_group("scores", "one of --gold, --oracle and --judge; without any, no scores")
    scores.add_argument("--gold", metavar="NAME", help="a gold reward (vader, plain, ...)")
    scores.add_argument("--oracle", type=path, metavar="DIR", help="a DPO oracle: beta times its summed token rewards")
    scores.add_argument("--reference", type=path, metavar="MODEL", help="the model that the oracle started from")
    parser.add_argument(
        "--server", metavar="URL",
        help="the model is behind this OpenAI-compatible server; options of a connection hold for it and for the judge",
    )  # fmt: skip
    retry_option(judge_options(parser))


def run(arguments: argparse.Namespace) -> int:
    temperatures = _temperatures(arguments)
    _check_numbers(arguments)
    scoring = _scoring(arguments)
    options = template_keywords(arguments)
    endpoint = None if arguments.server is None else endpoint_of(arguments, options)
    quiet_libraries()
    from sepo.processes import log
    from sepo.sampling.answers import How
    from sepo.sampling.prompts import read_prompts, some_prompts
    from sepo.sampling.responses import RESPONSES, counts_of, write_responses

    if scoring is not None:
        scoring.check()
    prompts = some_prompts(read_prompts(arguments.prompts), limit=arguments.limit)
    how = How(temperatures, arguments.max_new_tokens, arguments.seed)
    with writing_to(arguments) as out:
        table, missing = _sampled(arguments, prompts, how, scoring, endpoint, options, out)
        write_responses(out / RESPONSES, table)
    counts = counts_of(table)
    print(out / RESPONSES)
    log(
        f"{counts['prompts']:,} prompts, {counts['answers']:,} answers, {counts['tokens']:,} tokens; "
        f"{counts['cut']:,} answers are cut off, {counts['no_answer']:,} are empty"
    )
    if endpoint is not None and counts["no_answer"]:
        log("--retry-failed asks again for answers that are empty")
    if scoring is not None and counts["no_score"]:
        log(f"{counts['no_score']:,} answers have no score: they are in no pair")
    if missing:
        log(f"{missing:,} prompts or scores are missing for want of a reply: the same command asks again")
    return 1 if missing else 0


def _sampled(
    arguments: argparse.Namespace,
    prompts: Sequence[Prompt],
    how: How,
    scoring: Scoring | None,
    endpoint: Endpoint | None,
    options: Mapping[str, Any],
    out: Any,
) -> tuple[Any, int]:
    """The responses table, and the number of prompts without answers and of calls to a judge without reply."""
    from sepo.files import digest
    from sepo.judging.answering import claim_folder
    from sepo.judging.replies import Spent
    from sepo.processes import log
    from sepo.sampling.answers import sample_all
    from sepo.sampling.responses import NONE, RECORD, SAMPLED, SCORED, Answers, Grown, responses_table
    from sepo.sampling.scores import score_all

    record = _record(arguments, how, options)
    claim_folder(out, record, RECORD, SAMPLED)
    spent: list[Spent] = []

    def kept() -> str:
        return "finished prompts are kept; the same command does the rest"

    with log_kept_on_interrupt(kept):
        grown = Grown(out / SAMPLED, digest(record))
        if endpoint is not None and arguments.retry_failed:
            grown.forget(lambda answers: NONE in Answers(*answers).ends)
        found = sample_all(prompts, lambda: _source(arguments, prompts, how, options, endpoint, spent), grown)
        if spent:
            log(sum(spent, Spent()).in_words())
        whole = [(prompt, answers) for prompt, answers in zip(prompts, found, strict=True) if answers is not None]
        asked, answers = [prompt for prompt, _ in whole], [answers for _, answers in whole]
        scores, missing = None, 0
        if scoring is not None:
            grown = Grown(out / SCORED, digest([digest(record), scoring.key()]))
            scores, missing = score_all(asked, answers, scoring, grown, arguments.device)
    plain = _is_plain(arguments)
    table = responses_table(
        [prompt._replace(plain=plain and len(prompt.messages) == 1) for prompt in asked],
        answers,
        scores,
        temperatures=how.temperatures,
        seed=how.seed,
        made_with={"made_with": _made_with(arguments, how, scoring)},
    )
    return table, missing + len(prompts) - len(asked)


def _is_plain(arguments: argparse.Namespace) -> bool:
    """Does the model have no chat template, so that a prompt is a plain text?"""
    if arguments.server is not None:
        return False
    from sepo.models.tokenizer import load_tokenizer

    return load_tokenizer(arguments.model).chat_template is None


def _made_with(arguments: argparse.Namespace, how: How, scoring: Scoring | None) -> dict[str, Any]:
    """How the table was made, for the data card."""
    return {
        "model": arguments.model,
        **how.key(),
        "prompts": arguments.prompts,
        **({} if scoring is None else {"scored by": scoring.name}),
    }


def _record(arguments: argparse.Namespace, how: How, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the answers depend on beside the prompts: more prompts may be sampled into the same folder."""
    record: dict[str, Any] = {
        "engine": arguments.engine or ("server" if arguments.server else "transformers"),
        **how.key(),
        "chat_template_kwargs": dict(options),
    }
    if arguments.server is not None:
        given = {"request": arguments.request} if arguments.request else {}
        return {**record, "server": arguments.server, "model": arguments.model, **given}
    from sepo.models.fingerprint import model_fingerprint, usage_fingerprint

    return {**record, "model": [model_fingerprint(arguments.model), usage_fingerprint(arguments.model)]}


def _source(
    arguments: argparse.Namespace,
    prompts: Sequence[Prompt],
    how: How,
    options: Mapping[str, Any],
    endpoint: Endpoint | None,
    spent: list[Spent],
) -> Source:
    """Load the model, or use the server."""
    from sepo.sampling.answers import engine_source, transformers_source

    if endpoint is not None:
        from sepo.judging.answering import server_engine

        engine = server_engine(
            endpoint, max_new_tokens=how.max_new_tokens, seed=how.seed, spent=spent, failures=Counter(),
            with_failures=True,
        )  # fmt: skip
        return engine_source(engine, prompts, how)
    if arguments.engine == "vllm":
        return engine_source(engine_of(arguments, options, None, spent, Counter()), prompts, how)
    from sepo.models.tokenizer import load_tokenizer
    from sepo.models.weights import load_model

    model = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    tokenizer = load_tokenizer(arguments.model)
    return transformers_source(model, tokenizer, prompts, how, batch_size=arguments.batch_size, options=options)


def _scoring(arguments: argparse.Namespace) -> Scoring | None:
    """What scores the answers; None without any of the options. Raises UserError for several."""
    names = [name for name in ("gold", "oracle", "judge") if getattr(arguments, name) is not None]
    if len(names) > 1:
        raise UserError(f"--{names[0]} and --{names[1]} both score the answers: leave one of them out")
    if arguments.reference is not None and arguments.oracle is None:
        raise UserError("--reference is for --oracle: leave it out")
    if arguments.oracle is not None:
        arguments.judge, arguments.judge_reference = f"oracle:{arguments.oracle}", arguments.reference
    given = argparse.Namespace(**vars(arguments))
    if arguments.server is not None and not (arguments.judge or "").startswith("server:"):
        for name in _CONNECTION:  # of the model's server
            setattr(given, name, None)
        given.header, given.request = [], []
    judge = judge_of(given)
    if not names:
        return None
    from sepo.sampling.scores import Scoring

    return Scoring(arguments.gold, judge)


def _temperatures(arguments: argparse.Namespace) -> tuple[float, ...]:
    """The temperature of each answer to a prompt. Raises UserError."""
    check_number("--samples", arguments.samples, whole=True, least=1)
    try:
        given = [float(part) for part in str(arguments.temperature).split(",")]
    except ValueError:
        raise UserError(f"--temperature {arguments.temperature}: expected numbers such as 0.7,1.0") from None
    for value in given:
        check_number("--temperature", value, least=0)
    if min(given) == 0 and (arguments.samples > 1 or max(given) > 0):
        raise UserError("--temperature 0 gives every answer to a prompt the same text: expected temperatures above 0")
    return tuple(given[i % len(given)] for i in range(arguments.samples))


def _check_numbers(arguments: argparse.Namespace) -> None:
    if arguments.server is not None and arguments.engine is not None:
        raise UserError("--engine is for a local model: leave it out with --server")
    check_number("--max-new-tokens", arguments.max_new_tokens, whole=True, least=1)
    check_number("--seed", arguments.seed, whole=True, least=0, below=2**32)
    for name in ("batch_size", "limit"):
        if getattr(arguments, name) is not None:
            check_number(f"--{name.replace('_', '-')}", getattr(arguments, name), whole=True, least=1)
