"""What each command does, once its arguments are read. Libraries are imported where they are needed."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sepo.cli.output import print_metrics, print_plan, print_scores, print_summary
from sepo.errors import UserError
from sepo.files import check_writable

if TYPE_CHECKING:
    from sepo.recipe.settings import JudgeSettings, Recipe


def run_command(arguments: argparse.Namespace) -> None:
    from sepo.recipe.reading import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    target = _target_of(arguments)
    _quiet_libraries()
    from sepo.planning.plan import RunPlan, Target, plan_run
    from sepo.runs.pipeline import run_recipe

    if arguments.dry_run:
        processes = _join("cpu")
        plan = RunPlan(**processes.on_main(lambda: vars(plan_run(recipe, Target(*target)))))
        if processes.is_main():
            print_plan(f"plan of {recipe.name}", plan.stages)
            if plan.memory:
                print_plan("memory of each device", plan.memory, wide=True)
        return
    metrics = run_recipe(recipe)
    if _join(recipe.device).is_main():
        from sepo.report.run_summary import summarise_run

        if arguments.verbose:
            print_metrics(f"{recipe.name}: {recipe.run_folder}", metrics)
        print_summary(summarise_run(recipe, metrics))


def compare_command(arguments: argparse.Namespace) -> None:
    from sepo.study.grid import load_grid

    grid, settings = load_grid(arguments.grid, arguments.overrides)
    _quiet_libraries()
    from sepo.planning.plan import plan_grid
    from sepo.study.comparison import compare

    if arguments.dry_run:
        print_plan(f"plan of {grid.name}", plan_grid(grid, settings))
        return
    compare(grid, settings)
    folder = grid.results_folder
    print((folder / "compare.md").read_text(encoding="utf-8"))
    print(f"{folder}/compare.md  compare.json  frontier.png")


def analyse_command(arguments: argparse.Namespace) -> None:
    from sepo.credit.selection import check_rate

    check_rate("k", arguments.k)
    runs = [Path(run) for run in arguments.run]
    if not runs and (not arguments.table or arguments.out is None):
        raise UserError("analyse needs a run folder, or --table DIR and --out DIR: see `sepo analyse --help`")
    if len(runs) > 1 and (arguments.rules is None or arguments.out is None):
        raise UserError("analyse takes several run folders with --rules and --out DIR: see `sepo analyse --help`")
    out = Path(arguments.out) if arguments.out else runs[0] / "analysis"
    check_writable(out)
    _quiet_libraries()
    from sepo.analyse.analysis import analyse, rank, rank_inputs, read_rules, run_inputs

    if arguments.rules is not None:
        rules = read_rules(None if arguments.rules is True else Path(arguments.rules), arguments.k)
        oracles, gold = rank_inputs(runs, arguments.table, tokenizer=arguments.tokenizer, gold=arguments.gold)
        rank(oracles, rules, gold, out, seed=arguments.seed)
        print((out / "ranking.md").read_text(encoding="utf-8"))
        return
    inputs = run_inputs(
        runs[0] if runs else None,
        arguments.table,
        tokenizer=arguments.tokenizer,
        reference_logps=arguments.reference_logps,
        gold=arguments.gold,
    )
    analyse(inputs, out, k=arguments.k, seed=arguments.seed)
    print((out / "analysis.md").read_text(encoding="utf-8"))


def recipe_command(arguments: argparse.Namespace) -> None:
    from sepo.recipe import builtin

    if arguments.list:
        print_plan("built in", [{"name": name, "what": builtin.about(path)} for name, path in builtin.names().items()])
    elif arguments.schema:
        from sepo.recipe.settings import Recipe

        print(json.dumps(Recipe.model_json_schema(), indent=2))
    elif arguments.name is not None:
        print(builtin.read(arguments.name), end="")
    else:
        from sepo.recipe.reading import describe_recipe

        print(describe_recipe())


def oracle_command(arguments: argparse.Namespace) -> None:
    recipe = _recipe_of(arguments, reference={"model": arguments.reference}, oracle=_training_of(arguments))
    _quiet_libraries()
    from sepo.models.names import resolve_model
    from sepo.models.tokenizer import load_tokenizer
    from sepo.stages import data, oracle, reference
    from sepo.training.checkpoints import check_model_folder
    from sepo.training.fit import train_model

    with _writing_to(arguments, check_model_folder) as out:
        _join(arguments.device).on_main(lambda: [stage.check(recipe) for stage in (reference, oracle, data)] and None)
        model = resolve_model(arguments.reference)
        pairs = data.read_pairs(recipe.data, load_tokenizer(model))
        data.check_limits(recipe, [pairs])
        results = train_model(
            model,
            pairs,
            out,
            recipe.oracle.training,
            lora=recipe.oracle.lora,
            seed=recipe.seed,
            device=recipe.device,
            objective="dpo",
            beta=recipe.oracle.beta,
        )
    print_metrics(f"oracle: {arguments.out}", {"pairs": len(pairs), **results})


def score_command(arguments: argparse.Namespace) -> None:
    recipe = _recipe_of(
        arguments, reference={"model": arguments.reference}, oracle={"model": arguments.oracle},
        tokens_per_row=arguments.tokens_per_row,
    )  # fmt: skip
    _quiet_libraries()
    from sepo.data.tables import read_table
    from sepo.evaluate.accuracy import oracle_accuracy
    from sepo.models.names import resolve_model
    from sepo.models.tokenizer import load_tokenizer
    from sepo.stages import data, oracle, reference
    from sepo.stages.logps import logps_pass, scoring_dtype
    from sepo.stages.score import score_pairs

    with _writing_to(arguments) as out:
        processes = _join(arguments.device)
        processes.on_main(lambda: [stage.check(recipe) for stage in (reference, oracle, data)] and None)
        models = {"reference": resolve_model(arguments.reference), "oracle": resolve_model(arguments.oracle)}

        def write_pairs() -> int:
            pairs = data.read_pairs(recipe.data, load_tokenizer(models["reference"]))
            data.check_limits(recipe, [pairs])
            data.write_pairs(out / "pairs", pairs)
            return len(pairs)

        pairs = processes.on_main(write_pairs)
        stores = {
            role: logps_pass(
                model,
                out / "pairs",
                out / "logps" / role,
                device=recipe.device,
                dtype=scoring_dtype(recipe),
                tokens_per_row=recipe.tokens_per_row,
                description=role,
            )
            for role, model in models.items()
        }
        processes.on_main(lambda: str(score_pairs(out / "pairs", [stores["oracle"]], stores["reference"], out)))
        # Whose ids they are, for `sepo transfer` and `sepo report`.
        processes.on_main(lambda: str(load_tokenizer(models["reference"]).save_pretrained(out / "tokenizer")))
    print_metrics(f"scores: {out}", {"pairs": pairs, **oracle_accuracy(read_table(out, "scores"))})


def transfer_command(arguments: argparse.Namespace) -> None:
    recipe = _recipe_of(arguments, policy={"model": arguments.tokenizer}, transfer={"allocation": arguments.allocation})
    _quiet_libraries()
    from sepo.data.tables import read_table
    from sepo.data.vocabulary import token_bytes
    from sepo.evaluate.accuracy import oracle_accuracy
    from sepo.models.tokenizer import load_tokenizer
    from sepo.stages import data
    from sepo.stages.transfer import carry_table, tokenizer_of_table

    def write_scores(out: Path) -> dict[str, float]:
        table = Path(arguments.table)
        own, name = tokenizer_of_table(table, arguments.table_tokenizer)
        data.check(recipe)
        other = load_tokenizer(arguments.tokenizer)
        readers = token_bytes(own, name), token_bytes(other, arguments.tokenizer)
        pairs = data.read_pairs(recipe.data, other)
        report = carry_table(
            table,
            "scores",
            itertools.repeat(pairs),
            readers,
            out,
            recipe.transfer.allocation,
            (name, arguments.tokenizer),
        )
        other.save_pretrained(out / "tokenizer")
        log(f"  {report.summary()}")
        return report.figures()

    with _writing_to(arguments) as out:
        processes = _join("cpu")
        log = processes.log
        figures = processes.on_main(lambda: write_scores(out))
    print_metrics(f"scores: {arguments.out}", {**figures, **oracle_accuracy(read_table(arguments.out, "scores"))})


def select_command(arguments: argparse.Namespace) -> None:
    from sepo.credit.selection import check_rate
    from sepo.recipe.reading import load_recipe

    rates = {
        side: arguments.k if getattr(arguments, f"k_{side}") is None else getattr(arguments, f"k_{side}")
        for side in ("chosen", "rejected")
    }
    for side, rate in rates.items():
        check_rate(f"k_{side}", rate)
    settings = load_recipe(None, [f"select.{item}" for item in arguments.overrides]).select.model_dump()
    settings |= {"k_chosen": rates["chosen"], "k_rejected": rates["rejected"]}
    settings["include_end"] |= arguments.include_end
    from sepo.credit.rewards import combine_scores
    from sepo.data.ragged import flat
    from sepo.data.tables import number_of_rows, read_table, table_paths, write_table
    from sepo.stages.select import pair_weights, select

    def write_selection(out: Path) -> str:
        scores = Path(arguments.table[0])
        with tempfile.TemporaryDirectory() as folder:
            if len(arguments.table) > 1:
                joined = combine_scores([read_table(path, "scores") for path in arguments.table], arguments.combine)
                scores = Path(folder)
                # In shards as large as those of the first.
                rows = number_of_rows(table_paths(arguments.table[0], "scores")[0])
                write_table(scores, joined, max(rows, 1))
            return str(select(scores, out, **settings, seed=arguments.seed))

    with _writing_to(arguments) as out:
        _join("cpu").on_main(lambda: write_selection(out))
    table = read_table(arguments.out, "selection")
    metrics: dict[str, float] = {"pairs": len(table)}
    for side in ("chosen", "rejected"):
        kept, total = (int(flat(table.column(f"{side}_{part}"))[1].sum()) for part in ("positions", "ids"))
        metrics |= {f"{side}/tokens": total, f"{side}/key_tokens": kept, f"{side}/share": kept / total}
    print_metrics(f"selection: {arguments.out}", metrics | pair_weights(table))


def train_command(arguments: argparse.Namespace) -> None:
    recipe = _recipe_of(arguments, reference={"model": arguments.policy}, policy=_training_of(arguments))
    policy = recipe.policy
    _quiet_libraries()
    from sepo.data.fingerprints import check_table_tokenizer
    from sepo.data.tables import read_table
    from sepo.models.names import resolve_model
    from sepo.models.tokenizer import load_tokenizer
    from sepo.stages import data, reference, train
    from sepo.training.checkpoints import check_model_folder
    from sepo.training.fit import objective_settings, train_model

    with _writing_to(arguments, check_model_folder) as out:
        _join(arguments.device).on_main(lambda: [stage.check(recipe) for stage in (reference, train)] and None)
        table = read_table(arguments.selection, "selection")
        model = resolve_model(arguments.policy)
        check_table_tokenizer(table, load_tokenizer(model), arguments.selection, arguments.policy)
        data.check_limits(recipe, [table])
        results = train_model(
            model,
            table,
            out,
            policy.training,
            lora=policy.lora,
            seed=recipe.seed,
            device=recipe.device,
            **objective_settings(policy),
        )
    print_metrics(f"policy: {arguments.out}", {"pairs": len(table), **results})


def eval_command(arguments: argparse.Namespace) -> None:
    settings = {
        name: getattr(arguments, name)
        for name in ("gold", "judge", "prompts", "samples", "max_new_tokens", "batch_size")
    }
    if given := _oracle_options(arguments):
        settings["judge"] = {"oracle": arguments.judge.removeprefix("oracle:"), **given}
    recipe = _recipe_of(
        arguments, reference={"model": arguments.base}, policy={"model": arguments.policy}, eval=settings
    )
    _quiet_libraries()
    from sepo.evaluate.measure import evaluate_run
    from sepo.files import write_json
    from sepo.models.names import resolve_model
    from sepo.models.tokenizer import load_tokenizer
    from sepo.stages import data, evaluate, reference, train, transfer

    def write_pairs(out: Path) -> None:
        for stage in (reference, train, evaluate, data):
            stage.check(recipe)
        if transfer.needed(recipe):
            raise UserError(
                f"policy '{arguments.policy}' and base '{arguments.base}' have different tokenizers: expected the "
                "model that the policy was trained from"
            )
        pairs = data.read_pairs(recipe.data, load_tokenizer(resolve_model(arguments.base)))
        data.check_limits(recipe, [pairs])
        if recipe.eval.prompts:
            data.check_limits(recipe, [pairs], recipe.eval.max_new_tokens)
        data.write_pairs(out / "pairs", pairs)

    with _writing_to(arguments) as out:
        processes = _join(recipe.device)
        processes.on_main(lambda: write_pairs(out))
        policy, base = resolve_model(arguments.policy), resolve_model(arguments.base)
        metrics = evaluate_run(policy, base, out / "pairs", out, recipe.eval, seed=recipe.seed, device=recipe.device)
        processes.on_main(lambda: write_json(out / "metrics.json", metrics))
    print_metrics(f"eval: {out}", metrics)


def report_command(arguments: argparse.Namespace) -> None:
    if (arguments.run is None) == (arguments.table is None):
        raise UserError("report needs a run folder or --table DIR, one of the two: see `sepo report --help`")
    run = None if arguments.run is None else Path(arguments.run)
    if run is not None and not (run / "manifest.json").is_file():
        raise UserError(f"'{run}' is not a run folder (no manifest.json): expected what `sepo run` wrote")
    table = None if arguments.table is None else Path(arguments.table)
    tokenizer = None
    if arguments.tokenizer is not None:
        _quiet_libraries()
        from sepo.models.names import resolve_model

        tokenizer = Path(resolve_model(arguments.tokenizer))
    from sepo.report.build import build_report
    from sepo.report.figures import save_figures

    source = run or table
    assert source is not None
    out = Path(arguments.out) if arguments.out else (run or source.parent) / "report.html"
    if out.is_dir():
        raise UserError(f"'{out}' is a folder: --out names the HTML file")
    for folder in (out.parent, *([Path(arguments.figures)] if arguments.figures else [])):
        check_writable(folder)

    def write() -> None:
        print(build_report(run, table=table, tokenizer=tokenizer, out=out, max_pairs=arguments.max_pairs))
        if arguments.figures:
            for path in save_figures(source, Path(arguments.figures)):
                print(path)

    _join("cpu").on_main(write)


def push_command(arguments: argparse.Namespace) -> None:
    _quiet_libraries()
    from sepo.hub import push

    for name in filter(None, (arguments.to, arguments.base)):
        push.check_name(name)
    plan = push.plan(Path(arguments.run), arguments.what, base=arguments.base, license=arguments.license)
    print_plan(f"{arguments.what} of {arguments.run} -> {plan.repo_type} {arguments.to}", plan.lines())
    if arguments.dry_run:
        return
    print(push.upload(plan, arguments.to, private=arguments.private or None))


def winrate_command(arguments: argparse.Namespace) -> None:
    from sepo.files import write_json
    from sepo.judging.judgements import score_files
    from sepo.judging.winrate import read_official

    if arguments.json is not None:
        check_writable(Path(arguments.json).parent)
        if Path(arguments.json).is_dir():
            raise UserError(f"'{arguments.json}' is a folder: --json names the file to write")
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed}: expected 0 or more")
    official = None if arguments.glm_data is None else read_official(Path(arguments.glm_data))
    results = score_files(
        arguments.files, official=official, answers=arguments.answers, baseline=arguments.baseline, seed=arguments.seed
    )
    _show_scores(results)
    if arguments.json is not None:
        # One model's figures lie at the top, where everyone looks for `win_rate`.
        write_json(Path(arguments.json), next(iter(results.values())) if len(results) == 1 else results)


def generate_command(arguments: argparse.Namespace) -> int:
    from sepo.errors import check_number, log_kept_on_interrupt
    from sepo.judging import answering
    from sepo.judging.endpoint import KEY_VARIABLE, Endpoint
    from sepo.judging.questions import find_questions, read_questions
    from sepo.judging.server_judge import spent_text
    from sepo.processes import log
    from sepo.recipe.reading import parse_override

    if arguments.server is not None and arguments.engine is not None:
        raise UserError("--engine is for a model here: leave it out with --server")
    check_number("--max-new-tokens", arguments.max_new_tokens, whole=True, least=1)
    check_number("--seed", arguments.seed, whole=True, least=0, below=2**32)
    if arguments.temperature is not None:
        check_number("--temperature", arguments.temperature, least=0)
    if arguments.batch_size is not None:
        check_number("--batch-size", arguments.batch_size, whole=True, least=1)
    if arguments.limit is not None:
        check_number("--limit", arguments.limit, whole=True, least=1)
    options = dict(parse_override(item) for item in arguments.chat_template)
    questions, benchmark = read_questions(*find_questions(arguments.prompts))
    asked = answering.questions_digest(questions)  # of all: with a higher --limit the same folder goes on
    questions = questions[: arguments.limit]
    if benchmark == "alpaca_eval" and any(len(question.turns) > 1 for question in questions):
        raise UserError(f"'{arguments.prompts}' has questions of several turns, which AlpacaEval's form cannot hold")
    out = Path(arguments.out)
    name = arguments.name or arguments.model.rstrip("/").rpartition("/")[2]
    record: dict[str, Any] = {
        "engine": arguments.engine or ("server" if arguments.server else "transformers"),
        "prompts": asked,
        "benchmark": benchmark,
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "seed": arguments.seed,
        "chat_template_kwargs": options,
    }
    spent: list[Any] = []
    if arguments.server is not None:
        given = {key: getattr(arguments, key) for key in ("concurrency", "timeout", "retries", "cache")}
        given = {key: value for key, value in given.items() if value is not None}
        variable = arguments.key_variable or KEY_VARIABLE
        endpoint = Endpoint(arguments.server, arguments.model, key_variable=variable, **given)
        record |= {"server": arguments.server, "model": arguments.model}
    else:
        _quiet_libraries()
        from sepo.models.fingerprint import model_fingerprint, usage_fingerprint

        record["model"] = [model_fingerprint(arguments.model), usage_fingerprint(arguments.model)]

    def engine() -> answering.Engine:
        settings = {"max_new_tokens": arguments.max_new_tokens, "seed": arguments.seed}
        if arguments.server is not None:
            return answering.server_engine(endpoint, **settings, spent=spent)
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
            return answering.vllm_engine(folder, tokenizer, options=options, adapter=adapter, **settings)
        model = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
        return answering.transformers_engine(
            model, tokenizer, batch_size=arguments.batch_size, options=options, **settings
        )

    with _writing_to(arguments):
        answering.settle(out, record)
        finished = answering.AnswerLog.read(out / answering.FINISHED)
        remaining = sum(not answering.is_whole(question, finished) for question in questions)
        log(f"{len(questions)} questions, {remaining} to be answered")

        def kept() -> str:
            left = sum(not answering.is_whole(question, finished) for question in questions)
            return f"{len(questions) - left} of {len(questions)} questions are answered; the same command does the rest"

        if remaining:
            with log_kept_on_interrupt(kept):
                remaining = answering.answer_all(questions, benchmark, finished, engine(), arguments.temperature)
        path = answering.write_answers(out, questions, benchmark, finished, name)
    if spent:
        log(spent_text(answering.total_spent(spent), None))
    print(path)
    if remaining:
        log(f"{remaining} of {len(questions)} questions have no answer: the same command asks again")
    return 1 if remaining else 0


def judge_command(arguments: argparse.Namespace) -> None:
    from sepo.files import write_json, write_text
    from sepo.judging import judge as compare
    from sepo.judging.endpoint import Spent
    from sepo.judging.judgements import score_files
    from sepo.judging.server_judge import spent_text
    from sepo.processes import log

    settings = _judge_of(arguments)
    prices = _prices_of(arguments)
    if settings.server is None and arguments.reference_answers is not None:
        raise UserError("--reference-answers is for a judge behind a server: leave it out")
    paths = [getattr(arguments, name) for name in ("answers", "against", "questions", "reference_answers")]
    matches, missing = compare.read_all(*(None if path is None else Path(path) for path in paths))  # type: ignore[arg-type]
    contests = [one.contest for one in matches]
    grade = arguments.against is None
    prepared = compare.prepare(settings, contests, grade, arguments.retry_failed)
    for line in missing.lines():
        log(line)
    ahead = compare.expected(prepared, prices)
    if ahead is not None:
        cost = "unknown (--prices)" if ahead.cost is None else f"{ahead.cost:.4g}"
        log(
            f"{ahead.questions:,} calls ({ahead.cached:,} replies are there), about {ahead.prompt_tokens:,} tokens to "
            f"read and at most {ahead.completion_tokens:,} to write, cost at most {cost}, "
            f"about {ahead.seconds / 60:.0f} min"
        )
        if arguments.max_cost is not None:
            if ahead.cost is None:
                raise UserError("--max-cost needs --prices, of a million tokens read and written: --prices 2.5 10")
            if ahead.cost > arguments.max_cost:
                raise UserError(
                    f"it may cost {ahead.cost:.4g}, more than --max-cost {arguments.max_cost:g}: nothing was asked"
                )
    if arguments.dry_run:
        return
    if settings.reward_model is not None or settings.oracle is not None:
        _quiet_libraries()
    rows: list[dict[str, Any]]
    games: list[dict[str, Any]] = []
    results: dict[str, dict[str, Any]] = {}
    with _writing_to(arguments) as out:
        # Verdicts and what they cost are on the disk before they are scored: there may be none that can be.
        if grade and settings.server is None:
            scorer = compare.scorer_of(settings, arguments.device)
            values = compare.score_answers([compare.conversation(one) for one in contests], scorer)
            rows = compare.score_rows(matches, values)
            spent: dict[str, Any] = {"scored": len(values)}
            write_json(out / "scores_by_answer.json", rows, indent=1)
        elif grade:
            rows, spent = compare.grade_rows(prepared, matches)
            write_text(out / "judgement_single.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        else:
            verdicts, extra, spent = compare.judge_pairs(prepared, contests, arguments.device)
            rows = compare.annotation_rows(matches, verdicts, extra, settings.name)
            games = compare.arena_rows(matches, verdicts, settings.name)
            write_json(out / "annotations.json", rows, indent=1)
            if games:
                write_text(out / "model_judgment.jsonl", "".join(json.dumps(row) + "\n" for row in games))
        failures = Counter(row["failure"] for row in rows if row.get("failure"))
        record = {"spent": spent, "missing": missing._asdict(), "failures": dict(failures)}
        write_json(out / "judging.json", {"judge": settings.model_dump(mode="json", exclude_none=True), **record})
        for reason, number in failures.items():
            log(f"{number} without a verdict: {reason}")
        if prepared.endpoint is not None:
            log(spent_text(Spent(**spent), prices))
            if spent["unanswered"]:
                log("what has no reply is asked again by the same command; everything else is in the cache")
        if grade and settings.server is None:
            results = compare.mean_scores(rows, settings.name)
        elif grade:
            results = score_files([out / "judgement_single.jsonl"])
        else:
            results = score_files([out / "annotations.json"])
        if games:
            results |= {f"{name}, games": one for name, one in score_files([out / "model_judgment.jsonl"]).items()}
        write_json(out / "scores.json", next(iter(results.values())) if len(results) == 1 else results)
    _show_scores(results)


# --- helpers --------------------------------------------------------------------------------------------------------


def _recipe_of(arguments: argparse.Namespace, **sections: Any) -> Recipe:
    """The recipe that the options of a stage command amount to, checked as a recipe is."""
    from sepo.recipe.reading import parse_override, parse_recipe

    values = {key: value for key, value in sections.items() if value is not None}
    for name in ("seed", "device"):
        if hasattr(arguments, name):
            values[name] = getattr(arguments, name)
    if hasattr(arguments, "data"):
        columns: dict[str, str] = {}
        for item in arguments.column:
            ours, equals, theirs = item.partition("=")
            if not equals or not ours or not theirs:
                raise UserError(f"--column {item}: expected ours=theirs, such as chosen=preferred")
            columns[ours] = theirs
        values["data"] = {
            "source": arguments.data,
            "split": arguments.split,
            "columns": columns,
            "pairs_from": arguments.pairs_from,
            "as_chat": arguments.as_chat,
            "chat_template_kwargs": dict(parse_override(item) for item in arguments.chat_template),
            "max_length": arguments.max_length,
        }
    return parse_recipe(values, "command line")


def _judge_of(arguments: argparse.Namespace) -> JudgeSettings:
    """The judge that the options name, checked as a recipe's is."""
    from sepo.recipe.reading import parse_recipe
    from sepo.recipe.settings import JUDGE_FORMS, JUDGE_KINDS

    kind, _, name = arguments.judge.partition(":")
    field = JUDGE_KINDS.get(kind)
    if field is None or not name:
        raise UserError(f"--judge {arguments.judge}: expected {JUDGE_FORMS}")
    values: dict[str, Any] = {field: name, **_oracle_options(arguments)}
    for option, key in _JUDGE_OPTIONS.items():
        if (value := getattr(arguments, option)) is not None:
            if field != "server":
                raise UserError(f"--{option.replace('_', '-')} is for a judge behind a server: leave it out")
            values[key] = value
    if field == "server" and not (arguments.model_name and arguments.prompt):
        raise UserError(
            "a judge behind a server needs --model-name, its name there, and --prompt, a file with its words"
        )
    settings = parse_recipe({"eval": {"judge": values}}, "command line").eval.judge
    assert settings is not None
    return settings


def _oracle_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Reference and beta of a judge that is an oracle, where they are given, under their names in a recipe."""
    given = {"reference": arguments.judge_reference, "beta": arguments.judge_beta}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not (arguments.judge or "").startswith("oracle:"):
        raise UserError(f"--judge-{next(iter(given))} is for a judge that is an oracle: leave it out")
    return given


# Options of `sepo judge`, and what they are called in a recipe.
_JUDGE_OPTIONS = {
    "model_name": "model", "prompt": "prompt", "prompt_name": "prompt_name", "order": "order", "logprobs": "logprobs",
    "temperature": "temperature", "max_tokens": "max_tokens", "key_variable": "key_variable",
    "concurrency": "concurrency", "timeout": "timeout", "retries": "retries", "cache": "cache",
}  # fmt: skip


def _prices_of(arguments: argparse.Namespace) -> tuple[float, float] | None:
    if arguments.prices is None:
        return None
    read, written = arguments.prices
    if not (0 <= read < 1e6 and 0 <= written < 1e6):
        raise UserError(f"--prices {read:g} {written:g}: expected what a million tokens read and written cost")
    return read, written


def _show_scores(results: dict[str, dict[str, Any]]) -> None:
    """Print the scores of judged models, a table a benchmark, and what to know about them."""
    from sepo.processes import log

    for benchmark in dict.fromkeys(result["benchmark"] for result in results.values()):
        print_scores(benchmark, {name: one for name, one in results.items() if one["benchmark"] == benchmark})
    for name, result in results.items():
        for line in result["warnings"]:
            log(f"{name}: {line}")


def _target_of(arguments: argparse.Namespace) -> tuple[int, float | None]:
    """The devices that a dry run is planned for: their number, and bytes of each."""
    number, memory = arguments.processes, arguments.device_memory
    if (number is not None or memory is not None) and not arguments.dry_run:
        raise UserError("--processes and --device-memory are what a --dry-run plans for: add it, or leave them out")
    if number is not None and number < 1:
        raise UserError(f"--processes {number}: expected the number of devices, 1 or more")
    if memory is not None and not 0 < memory < 1e6:
        raise UserError(f"--device-memory {memory:g}: expected gigabytes of one device, such as 80")
    return number or 1, None if memory is None else 1e9 * memory


def _training_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """A recipe's section "oracle" or "policy" from options and `key=value` training settings."""
    from sepo.recipe.reading import parse_override, set_key

    values: dict[str, Any] = {}
    for item in arguments.training:
        key, value = parse_override(item)
        set_key(values, f"training.{key}", value, f"override '{item}'")
    for name in ("objective", "beta", "gamma", "margin", "alpha", "rate", "label_smoothing"):
        if getattr(arguments, name, None) is not None:
            values[name] = getattr(arguments, name)
    if arguments.lora is not None:
        values["lora"] = {"r": arguments.lora}
    return values


@contextlib.contextmanager
def _writing_to(arguments: argparse.Namespace, check: Callable[[Path], None] = lambda out: None) -> Iterator[Path]:
    """The folder `--out`, which no other command may write to meanwhile; `check` refuses a folder of other things."""
    out = Path(arguments.out)
    processes = _join(getattr(arguments, "device", "cpu"))
    processes.on_main(lambda: check(out))
    with processes.alone_in(out):
        processes.require_shared(out)
        yield out


def _join(device: str):
    """Meet the other processes of a launch (torchrun, accelerate launch); returns the module `processes`."""
    from sepo import processes

    processes.join(device)
    return processes


def _quiet_libraries() -> None:
    """Keep third-party progress bars and notices from drowning our own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Deprecations inside the libraries are their authors' business, not the user's.
    warnings.filterwarnings("ignore", category=FutureWarning)
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
