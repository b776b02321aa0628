"""`sepo generate`: answers of a model to the questions of a file or a benchmark."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sepo import engines
from sepo.command import (
    chat_template_option,
    device_options,
    model_option,
    named_values,
    out_option,
    path,
    quiet_libraries,
    template_keywords,
    writing_to,
)
from sepo.errors import UserError, check_number, log_kept_on_interrupt

if TYPE_CHECKING:
    from sepo.judging.answering import AnswerLog, Engine
    from sepo.judging.endpoint import Endpoint
    from sepo.judging.questions import Question
    from sepo.judging.replies import Spent

# Sampling settings that no request holds.
_SERVERS_OWN = (
    "top_p, top_k and repetition_penalty are the server's own, often from the model's generation_config.json: "
    "--request top_p=1 sets one"
)
HELP = "answer the questions of a file or a benchmark, in the benchmark's format"


def add_options(parser: argparse.ArgumentParser) -> None:
    model_option(parser, "--model", "the model that answers; with --server its name")
    parser.add_argument(
        "--prompts",
        type=path,
        required=True,
        metavar="FILE",
        help="questions: a file, or alpaca_eval, mt_bench, arena_hard",
    )
    out_option(parser, "folder for the answers; after an interruption the same command continues")
    parser.add_argument("--name", help="name of the model in the answers (default: the last part of MODEL)")
    parser.add_argument("--max-new-tokens", type=int, default=2048, help="length limit of an answer (default 2048)")
    parser.add_argument(
        "--temperature", type=float, help="sampling temperature; 0 for greedy (default: the benchmark's)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="answer only the first N questions")
    chat_template_option(parser)
    parser.add_argument(
        "--engine",
        metavar="ENGINE",
        help="what runs the model: transformers (default), vllm, or Transformers in many workers by files[:FOLDER] or "
        "ray[:ADDRESS] (docs/how-to/many-workers.md)",
    )
    parser.add_argument("--batch-size", type=int, help="answers at a time (default: fits the device)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="dtype of the weights")
    device_options(parser)
    steering = parser.add_argument_group("steering", "add an oracle's token rewards to the logits; no training")
    steering.add_argument(
        "--steer",
        type=float,
        metavar="ALPHA",
        help="sample from log p(MODEL) + ALPHA (log p(oracle) - log p(ref.))",
    )
    steering.add_argument("--oracle", type=path, metavar="DIR", help="the oracle")
    steering.add_argument("--reference", type=path, metavar="MODEL", help="the model that the oracle started from")
    server = parser.add_argument_group("a model behind a server")
    server.add_argument("--server", metavar="URL", help="OpenAI-compatible server, such as http://localhost:8000/v1")
    server_options(server)
    retry_option(server)


def server_options(group: argparse._ArgumentGroup) -> None:
    """Add the options for requests to a server."""
    group.add_argument(
        "--key-variable", metavar="NAME", help="environment variable with the key (default OPENAI_API_KEY)"
    )
    group.add_argument(
        "--key-header", metavar="NAME", help="header that holds the key, e.g. api-key for Azure (default Authorization)"
    )
    group.add_argument(
        "--header", action="append", default=[], metavar="NAME=VALUE", help="a further header of a request; repeatable"
    )
    group.add_argument(
        "--request",
        action="append",
        default=[],
        metavar="name=value",
        help="a further field of a request, e.g. top_p=1; null removes a field; repeatable",
    )
    group.add_argument("--concurrency", type=int, help="simultaneous requests (default 8)")
    group.add_argument("--timeout", type=float, help="total seconds of a request (default 300)")
    group.add_argument("--retries", type=int, help="how often a question without a reply is asked again (default 6)")
    group.add_argument("--cache", type=path, metavar="DIR", help="folder of replies (default: sepo's cache)")


def retry_option(group: argparse._ArgumentGroup) -> None:
    """Ask again where an earlier command kept a reply that is no answer."""
    group.add_argument("--retry-failed", action="store_true", help="ask again where the stored reply is no answer")


def server_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """`--header` and `--request` as mappings, where they are given."""
    values: dict[str, Any] = {}
    if arguments.header:
        values["header"] = named_values("--header", arguments.header)
    if arguments.request:
        values["request"] = named_values("--request", arguments.request, "name=value", typed=True)
    return values


def run(arguments: argparse.Namespace) -> int:
    from sepo.judging.answering import (
        FINISHED,
        AnswerLog,
        answer_all,
        claim_folder,
        is_open,
        is_whole,
        write_answers,
    )
    from sepo.processes import log

    _check_numbers(arguments)
    options = template_keywords(arguments)
    questions, benchmark, digest = _questions(arguments)
    endpoint = None if arguments.server is None else endpoint_of(arguments, options)
    record = _record(arguments, digest, benchmark, options)
    if endpoint is not None and arguments.request:
        record["request"] = dict(endpoint.more)
    spent: list[Spent] = []
    failures: Counter[str] = Counter()
    with engines.use(_units(arguments), Path(arguments.out)), writing_to(arguments) as out:
        claim_folder(out, record)
        finished = AnswerLog.read(out / FINISHED)

        def open_questions() -> int:
            return sum(is_open(question, finished) for question in questions)

        def kept() -> str:
            done = sum(is_whole(question, finished) for question in questions)
            return f"{done} of {len(questions)} questions are answered; the same command does the rest"

        log(f"{len(questions)} questions, {open_questions()} to be answered")
        if open_questions():
            with log_kept_on_interrupt(kept):
                if endpoint is not None:
                    log(_SERVERS_OWN)
                engine = engine_of(arguments, options, endpoint, spent, failures)
                answer_all(questions, benchmark, finished, engine, arguments.temperature)
        name = arguments.name or arguments.model.rstrip("/").rpartition("/")[2]
        file = write_answers(out, questions, benchmark, finished, name)
    from sepo.judging.replies import Spent

    cost = sum(spent, Spent())
    if spent:
        log(cost.in_words())
    print(file)
    return _log_missing(arguments, questions, finished, cost, failures)


def _questions(arguments: argparse.Namespace) -> tuple[list[Question], str, str]:
    """The questions to be answered, the name of their benchmark, and the digest of all questions of the file."""
    from sepo.judging.answering import questions_digest
    from sepo.judging.questions import find_questions, read_questions

    questions, benchmark = read_questions(*find_questions(arguments.prompts))
    digest = questions_digest(questions)  # of all questions: the folder stays valid with a higher --limit
    questions = questions[: arguments.limit]
    if benchmark == "alpaca_eval" and any(len(question.turns) > 1 for question in questions):
        raise UserError(
            f"'{arguments.prompts}' has questions of several turns, which AlpacaEval's format does not allow"
        )
    return questions, benchmark, digest


def _log_missing(
    arguments: argparse.Namespace,
    questions: list[Question],
    finished: AnswerLog,
    cost: Spent,
    failures: Counter[str],
) -> int:
    """Log the answers that are cut off and the questions without one; returns the exit code."""
    from sepo.judging.answering import FINISHED, failure_of, is_whole
    from sepo.processes import log

    remaining = sum(not is_whole(question, finished) for question in questions)
    unwritten = Counter(failure for question in questions if (failure := failure_of(question, finished)))
    turns = {(question.key, turn) for question in questions for turn in range(len(question.turns))}
    cut = sum(turn.finished is False for place, turn in finished.turns.items() if place in turns)
    if cut:
        log(
            f"{cut} of {len(turns)} answers are cut off at --max-new-tokens {arguments.max_new_tokens} "
            f'("finished": false in {FINISHED})'
        )
    if remaining:
        reasons = ", ".join(f"{reason}: {number}" for reason, number in (failures + unwritten).items())
        again = "the same command asks again"
        if unwritten:
            again = "they are left out; a model that thinks needs more --max-new-tokens"
        if cost.malformed + cost.cut + cost.refused:
            again += ", for a reply that is kept with --retry-failed"
        log(f"{remaining} of {len(questions)} questions have no answer{f' ({reasons})' if reasons else ''}: {again}")
    return 1 if remaining else 0


def _check_numbers(arguments: argparse.Namespace) -> None:
    if arguments.engine not in (None, "transformers", "vllm"):
        engines.check_engine(arguments.engine)
    if arguments.server is not None and arguments.engine is not None:
        raise UserError("--engine is for a local model: leave it out with --server")
    steering = [name for name in ("steer", "oracle", "reference") if getattr(arguments, name) is not None]
    if steering and len(steering) < 3:
        raise UserError("steering needs all of --steer, --oracle and --reference")
    if steering and (arguments.server is not None or arguments.engine not in (None, "transformers")):
        raise UserError("--steer needs the models' logits: leave --server and --engine out")
    if steering:
        check_number("--steer", arguments.steer)
    check_number("--max-new-tokens", arguments.max_new_tokens, whole=True, least=1)
    check_number("--seed", arguments.seed, whole=True, least=0, below=2**32)
    if arguments.temperature is not None:
        check_number("--temperature", arguments.temperature, least=0)
    if arguments.batch_size is not None:
        check_number("--batch-size", arguments.batch_size, whole=True, least=1)
    if arguments.limit is not None:
        check_number("--limit", arguments.limit, whole=True, least=1)


def endpoint_of(arguments: argparse.Namespace, options: Mapping[str, Any]) -> Endpoint:
    from sepo.judging.endpoint import Endpoint

    names = ("key_variable", "key_header", "concurrency", "timeout", "retries", "cache")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    values = server_values(arguments)
    # vLLM, SGLang and llama.cpp take the keywords of the chat template as a field.
    more = ({"chat_template_kwargs": dict(options)} if options else {}) | values.get("request", {})
    return Endpoint(
        arguments.server, arguments.model, headers=values.get("header", {}), more=more,
        retry_malformed=arguments.retry_failed, **given,
    )  # fmt: skip


def _record(arguments: argparse.Namespace, digest: str, benchmark: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the answers depend on."""
    record: dict[str, Any] = {
        "engine": "vllm" if arguments.engine == "vllm" else "server" if arguments.server else "transformers",
        "prompts": digest,
        "benchmark": benchmark,
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "seed": arguments.seed,
        "chat_template_kwargs": options,
    }
    if arguments.server is not None:
        return {**record, "server": arguments.server, "model": arguments.model}
    quiet_libraries()
    from sepo.models.fingerprint import model_fingerprint, usage_fingerprint

    if arguments.steer is not None:
        record["steer"] = [arguments.steer, *map(model_fingerprint, (arguments.oracle, arguments.reference))]
    return {**record, "model": [model_fingerprint(arguments.model), usage_fingerprint(arguments.model)]}


def engine_of(
    arguments: argparse.Namespace,
    options: Mapping[str, Any],
    endpoint: Endpoint | None,
    spent: list[Spent],
    failures: Counter[str],
) -> Engine:
    """Load the model, or use the server."""
    from sepo.judging.answering import server_engine, transformers_engine, units_engine, vllm_engine

    settings = {"max_new_tokens": arguments.max_new_tokens, "seed": arguments.seed}
    if endpoint is not None:
        return server_engine(endpoint, **settings, spent=spent, failures=failures)
    from sepo.models.folders import adapter_base, is_adapter
    from sepo.models.names import resolve_model
    from sepo.models.tokenizer import load_tokenizer
    from sepo.models.weights import load_model

    tokenizer = load_tokenizer(arguments.model)
    if arguments.engine == "vllm":
        folder, adapter = resolve_model(arguments.model), None
        if is_adapter(Path(folder)):
            base, revision = adapter_base(Path(folder))
            folder, adapter = resolve_model(base, revision=revision), folder
        return vllm_engine(folder, tokenizer, options=options, adapter=adapter, **settings)
    settings |= {"batch_size": arguments.batch_size, "options": options}
    if _units(arguments) != "local":
        out, on = Path(arguments.out), {"device": arguments.device, "dtype": arguments.dtype}
        return units_engine(arguments.model, tokenizer, out, on=on, **settings)
    model = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    if getattr(arguments, "steer", None) is not None:
        return _steered(arguments, model, tokenizer, options)
    return transformers_engine(model, tokenizer, **settings)


def _units(arguments: argparse.Namespace) -> str:
    """The engine of units of work; "local" for a model in this process and for vLLM."""
    return arguments.engine if arguments.engine not in (None, "transformers", "vllm") else "local"


def _steered(arguments: argparse.Namespace, model: Any, tokenizer: Any, options: Mapping[str, Any]) -> Engine:
    """Load the oracle, and its reference unless that is the model itself."""
    from sepo.data.fingerprints import check_same_tokenizer
    from sepo.judging.steering import Steered, steered_engine
    from sepo.models.fingerprint import model_fingerprint
    from sepo.models.tokenizer import load_tokenizer
    from sepo.models.weights import load_model

    names = (arguments.oracle, arguments.reference)
    for role, name in zip(("oracle", "reference"), names, strict=True):
        check_same_tokenizer(f"the {role} '{name}'", load_tokenizer(name), f"the model '{arguments.model}'", tokenizer)
    if model_fingerprint(arguments.oracle) == model_fingerprint(arguments.reference):
        raise UserError(f"the oracle '{arguments.oracle}' computes the same as its reference: it steers nothing")
    same = model_fingerprint(arguments.reference) == model_fingerprint(arguments.model)
    oracle, reference = (
        None if same and name is names[1] else load_model(name, device=arguments.device, dtype=arguments.dtype)
        for name in names
    )
    steered = Steered(model, oracle, reference, arguments.steer)
    settings = {"max_new_tokens": arguments.max_new_tokens, "seed": arguments.seed}
    return steered_engine(steered, tokenizer, batch_size=arguments.batch_size, options=options, **settings)
