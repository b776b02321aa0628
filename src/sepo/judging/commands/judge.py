"""`sepo judge`: verdicts on two models' answers, or grades of one model's."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sepo import engines
from sepo.command import engine_option, out_option, path, quiet_libraries, writing_to
from sepo.errors import UserError, check_number
from sepo.judging.commands.generate import retry_option, server_options, server_values
from sepo.judging.commands.winrate import print_scores, write_scores

if TYPE_CHECKING:
    from sepo.judging.judge import Match, Prepared
    from sepo.judging.scorers import Scorer
    from sepo.recipe.settings import JudgeSettings

HELP = "judge answers: compare two models', or grade one model's"

ANNOTATIONS, GAMES, GRADES = "annotations.json", "model_judgment.jsonl", "judgement_single.jsonl"
# Options for a judge behind a server, and their names in a recipe.
_SERVER_OPTIONS = {
    "model_name": "model", "prompt": "prompt", "prompt_name": "prompt_name", "order": "order", "logprobs": "logprobs",
    "judge_temperature": "temperature", "max_tokens": "max_tokens", "key_variable": "key_variable",
    "key_header": "key_header", "header": "headers", "request": "request",
    "concurrency": "concurrency", "timeout": "timeout", "retries": "retries", "cache": "cache",
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--answers", type=path, required=True, metavar="FILE", help="answers of the model, in any benchmark's format"
    )
    parser.add_argument(
        "--against", type=path, metavar="FILE", help="answers of the baseline; without it the answers are graded"
    )
    out_option(parser, "folder for annotations.json, scores.json and judging.json")
    parser.add_argument(
        "--questions", type=path, metavar="FILE", help="file of questions; needed if the answers do not repeat them"
    )
    parser.add_argument(
        "--device", default="auto", help="for a reward model or an oracle: auto, cpu, cuda, cuda:0, mps (default auto)"
    )
    engine_option(parser)
    server = judge_options(parser, required=True, temperature=["--temperature"])
    server.add_argument("--reference-answers", type=path, metavar="FILE", help="right answers, for MT-Bench's grades")
    retry_option(server)
    server.add_argument(
        "--prices",
        type=float,
        nargs=2,
        metavar=("READ", "WRITTEN"),
        help="price of a million tokens, for the estimate of the cost",
    )
    server.add_argument("--max-cost", type=float, help="ask nothing if the cost may exceed this")
    server.add_argument("--dry-run", action="store_true", help="estimate calls, tokens and cost; ask nothing")


def judge_options(
    parser: argparse.ArgumentParser, *, required: bool = False, temperature: Sequence[str] = ()
) -> argparse._ArgumentGroup:
    """Add the options that name a judge (`judge_of`); returns the group of a judge behind a server.

    Args:
        temperature: further names of `--judge-temperature`.
    """
    parser.add_argument(
        "--judge",
        required=required,
        metavar="JUDGE",
        help="reward:MODEL, oracle:FOLDER, function:MODULE:NAME, or server:http://HOST/v1",
    )
    oracle = parser.add_argument_group("oracle as judge", "needed only if the oracle's folder has no training metadata")
    oracle.add_argument("--judge-reference", type=path, metavar="MODEL", help="the model that the oracle started from")
    oracle.add_argument("--judge-beta", type=float, metavar="BETA", help="beta of the oracle's DPO")
    server = parser.add_argument_group("a judge behind a server")
    server.add_argument("--model-name", metavar="NAME", help="name of the model on the server")
    server.add_argument(
        "--prompt", type=path, metavar="FILE", help="the judge's prompt: the benchmark's txt, jsonl or yaml"
    )
    server.add_argument("--prompt-name", metavar="NAME", help="which prompt of a file with several")
    server.add_argument(
        "--order", choices=["both", "seeded"], help="ask in both orders (default), or in one drawn as in AlpacaEval"
    )
    server.add_argument(
        "--no-logprobs", dest="logprobs", action="store_const", const=False, help="do not ask for log-probabilities"
    )
    server.add_argument(
        *temperature,
        "--judge-temperature",
        dest="judge_temperature",
        metavar="T",
        help="sampling temperature of the judge (default 0); none leaves it to the server",
    )
    server.add_argument(
        "--max-tokens", type=int, help="length limit of a reply (default: 1 for a verdict of one token, else 2048)"
    )
    server_options(server)
    return server


def run(arguments: argparse.Namespace) -> int:
    from sepo.files import write_json
    from sepo.judging.judge import mean_scores, prepare_judge, read_matches
    from sepo.judging.judgements import score_files
    from sepo.judging.replies import CUT, Spent
    from sepo.processes import log

    settings = judge_of(arguments)
    assert settings is not None  # --judge is required
    if arguments.engine != "local" and settings.reward_model is None:
        raise UserError(f"--engine {arguments.engine} is for a judge that is a reward model: leave it out")
    prices = _prices_of(arguments)
    if settings.server is None and arguments.reference_answers is not None:
        raise UserError("--reference-answers is for a judge behind a server: leave it out")
    inputs = [getattr(arguments, name) for name in ("answers", "against", "questions", "reference_answers")]
    matches, missing = read_matches(*(None if file is None else Path(file) for file in inputs))  # type: ignore[arg-type]
    contests = [match.contest for match in matches]
    prepared = prepare_judge(settings, contests, arguments.against is None, arguments.retry_failed)
    for line in missing.lines():
        log(line)
    _announce_cost(prepared, prices, arguments.max_cost)
    if arguments.dry_run:
        return 0
    if settings.reward_model is not None or settings.oracle is not None:
        quiet_libraries()
    with engines.use(arguments.engine, Path(arguments.out)), writing_to(arguments) as out:
        # Verdicts and their cost are on disk before the scores are computed, which fails if there is no verdict.
        scorer = None
        if arguments.engine != "local":
            from sepo.judging.units import reward_units

            name = str(settings.reward_model)
            scorer = reward_units(name, revision=settings.revision, device=arguments.device, dtype="auto", out=out)
        rows, spent, files = _judge(prepared, matches, out, arguments.against is None, arguments.device, scorer)
        failures = Counter(row["failure"] for row in rows if row["failure"])
        record = {"spent": spent, "missing": missing._asdict(), "failures": dict(failures)}
        write_json(out / "judging.json", {"judge": settings.model_dump(mode="json", exclude_none=True), **record})
        for reason, number in failures.items():
            log(f"{number} without a verdict: {reason}")
        if any(CUT in reason for reason in failures):
            log("a judge that is cut off, above all one that thinks, needs more --max-tokens")
        if prepared.endpoint is not None:
            log(Spent(**spent).in_words(prices))
            if spent["unanswered"]:
                log("the same command asks the questions without a reply again; all replies are in the cache")
            if kept := spent["malformed"] + spent["cut"] + spent["refused"]:
                log(f"{kept} kept replies are no answer: --retry-failed asks those again")
        results = {} if files else mean_scores(rows, settings.name)
        for file in files:
            suffix = ", games" if file.name == GAMES else ""
            results |= {f"{name}{suffix}": result for name, result in score_files([file]).items()}
        write_scores(out / "scores.json", results)
    print_scores(results)
    print("  ".join([f"{out}/scores.json", "judging.json", *(file.name for file in files)]))
    return 1 if failures and prepared.endpoint is not None else 0


def _judge(
    prepared: Prepared, matches: Sequence[Match], out: Path, grade: bool, device: str, scorer: Scorer | None
) -> tuple[list[dict[str, Any]], dict[str, Any], list[Path]]:
    """Judge the answers and write the verdicts.

    Returns:
        the verdicts; their cost; the written files that `sepo winrate` reads.
    """
    from sepo.files import write_json, write_text
    from sepo.judging.judge import annotation_rows, arena_rows, grade_rows, judge_pairs, score_rows, scorer_of

    settings = prepared.settings
    if grade and prepared.endpoint is None:
        rows = score_rows(matches, scorer or scorer_of(settings, device))
        write_json(out / "scores_by_answer.json", rows, indent=1)
        return rows, {"scored": len(rows)}, []
    if grade:
        rows, spent = grade_rows(prepared, matches)
        write_text(out / GRADES, "".join(json.dumps(row) + "\n" for row in rows))
        return rows, spent, [out / GRADES]
    verdicts, columns, spent = judge_pairs(prepared, [match.contest for match in matches], device, scorer)
    rows = annotation_rows(matches, verdicts, columns, settings.name)
    write_json(out / ANNOTATIONS, rows, indent=1)
    games = arena_rows(matches, verdicts, settings.name)
    if not games:
        return rows, spent, [out / ANNOTATIONS]
    write_text(out / GAMES, "".join(json.dumps(row) + "\n" for row in games))
    return rows, spent, [out / ANNOTATIONS, out / GAMES]


def _announce_cost(prepared: Prepared, prices: tuple[float, float] | None, most: float | None) -> None:
    """Log the estimated cost of asking a server.

    Raises:
        UserError: the cost may exceed `most`, or cannot be compared with it.
    """
    from sepo.judging.judge import expected_calls
    from sepo.processes import log

    calls = expected_calls(prepared, prices)
    if calls is None:
        return
    cost = "unknown (--prices)" if calls.cost is None else f"{calls.cost:.4g}"
    log(
        f"{calls.questions:,} calls ({calls.cached:,} replies are cached), about {calls.prompt_tokens:,} tokens to "
        f"read and at most {calls.completion_tokens:,} to write, cost at most {cost}, "
        f"about {calls.seconds / 60:.0f} min"
    )
    if most is None:
        return
    if calls.cost is None:
        raise UserError("--max-cost needs --prices, of a million tokens read and written: --prices 2.5 10")
    if calls.cost > most:
        raise UserError(f"it may cost {calls.cost:.4g}, more than --max-cost {most:g}: nothing was asked")


def judge_of(arguments: argparse.Namespace) -> JudgeSettings | None:
    """The judge that the options of `judge_options` name, with a recipe's checks; None without `--judge`."""
    from sepo.recipe.reading import parse_recipe
    from sepo.recipe.settings import JUDGE_FORMS, JUDGE_KINDS

    kind, _, name = (arguments.judge or "").partition(":")
    field = JUDGE_KINDS.get(kind)
    if arguments.judge is not None and (field is None or not name):
        raise UserError(f"--judge {arguments.judge}: expected {JUDGE_FORMS}")
    values: dict[str, Any] = {}
    for option in ("reference", "beta"):
        if (value := getattr(arguments, f"judge_{option}")) is not None:
            if field != "oracle":
                raise UserError(f"--judge-{option} is for a judge that is an oracle: leave it out")
            values[option] = value
    given = {option: value for option in _SERVER_OPTIONS if (value := getattr(arguments, option)) not in (None, [])}
    if given and field != "server":
        raise UserError(f"--{next(iter(given)).replace('_', '-')} is for a judge behind a server: leave it out")
    if field is None:
        return None
    values |= {
        field: name,
        **{_SERVER_OPTIONS[key]: value for key, value in (given | server_values(arguments)).items()},
    }
    if "temperature" in values:
        values["temperature"] = _temperature(values["temperature"])
    # A recipe may name only keys; the command line may name any variable.
    key_variable = values.pop("key_variable", None)
    if field == "server" and not (arguments.model_name and arguments.prompt):
        raise UserError(
            "a judge behind a server needs --model-name, its name there, and --prompt, the file of its prompt"
        )
    settings = parse_recipe({"eval": {"judge": values}}, "command line").eval.judge
    assert settings is not None
    return settings if key_variable is None else settings.model_copy(update={"key_variable": key_variable})


def _temperature(text: str) -> float | None:
    """The value of `--temperature`; "none" leaves it to the server.

    Raises:
        UserError: it is no number of at least 0.
    """
    if text.lower() in ("none", "null"):
        return None
    try:
        value: object = float(text)
    except ValueError:
        value = text
    check_number("--temperature", value, least=0)
    return float(text)


def _prices_of(arguments: argparse.Namespace) -> tuple[float, float] | None:
    if arguments.prices is None:
        return None
    read, written = arguments.prices
    if not (0 <= read < 1e6 and 0 <= written < 1e6):
        raise UserError(f"--prices {read:g} {written:g}: expected the prices of a million tokens read and written")
    return read, written
