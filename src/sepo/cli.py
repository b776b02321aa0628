"""The `sepo` command: one subcommand a stage, and `run` for all of them.

Heavy libraries are imported by the subcommand that needs them, so that `--help` and a misspelt key answer at once.
A `UserError` ends as one line on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sepo.errors import UserError, impossible_path, known_failure, one_line

EPILOG = """\
the usual way:
  sepo run recipes/quickstart.yaml              the whole job, offline, on the embedded model and data
  sepo run my.yaml --dry-run                    what would be done: plan, counts, time and memory
  sepo run my.yaml oracle.beta=0.05             with one setting changed
  sepo recipe                                   every setting with its default and meaning
  sepo analyse runs/quickstart                  what the token rewards look like, and how far to trust them
  sepo compare recipes/experiments/objectives.yaml    rival objectives at one budget, over seeds

stage by stage, without a recipe:
  sepo oracle --reference MODEL --data prefs.parquet --out oracle learning_rate=5e-6
  sepo score  --oracle oracle --reference MODEL --data prefs.parquet --out scores
  sepo select --table scores --k 0.3 --out selection
  sepo train  --policy MODEL --selection selection --out policy learning_rate=5e-6
  sepo eval   --policy policy --base MODEL --data held_out.parquet --out eval
  sepo report --table scores --tokenizer MODEL  every token coloured by its reward, in the browser

MODEL is a hub id, a folder, a .gguf file, or package:PACKAGE/FILE.gguf. Data is a hub id, a folder or a
parquet, json, jsonl or csv file with the columns chosen, rejected and (unless both share it) prompt.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 1 failed, 2 bad input, 130 interrupted)."""
    arguments = parse_arguments(argv)
    try:
        code = arguments.work(arguments) or 0
        _leave()
        return code
    except UserError as error:
        print(f"sepo: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sepo: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if text := impossible_path(error):
            print(f"sepo: {text}", file=sys.stderr)
            return 2
        text = known_failure(error)
        if text is None and (isinstance(error, OSError) or type(error).__module__.startswith("sepo.")):
            text = one_line(error)
        if text is None:
            raise
        print(f"sepo: {text}", file=sys.stderr)
        return 1


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; `key=value` settings may stand anywhere, also after flags."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    settings = getattr(arguments, "overrides", getattr(arguments, "training", None))
    for item in rest:
        if settings is None or item.startswith("-") or "=" not in item:
            parser.error(f"unrecognized argument: {item}")
        settings.append(item)
    return arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))  # it repeats what it was given, however long


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sepo",
        description="Selective preference optimization: align a model on the tokens that carry the preference.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, work: Callable, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(work=work)
        return sub

    run = command("run", run_command, "run all stages of a recipe, reusing what stands")
    run.add_argument("recipe", help="YAML file; see recipes/ and `sepo recipe`")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, e.g. oracle.beta=0.2")
    run.add_argument("--dry-run", action="store_true", help="show plan, counts and estimates; train nothing")

    compare = command("compare", compare_command, "train every method of a grid at one budget and compare them")
    compare.add_argument("grid", help="YAML file; see docs/compare.md and recipes/experiments/")
    compare.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change in all variants")
    compare.add_argument("--dry-run", action="store_true", help="show the runs and an estimate of time; train nothing")

    analyse = command("analyse", analyse_command, "say what token rewards look like, and how far they can be trusted")
    analyse.add_argument("run", nargs="?", metavar="RUN", help="run folder: its scores, tokenizer and gold reward")
    analyse.add_argument(
        "--table",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="a score table; repeat for several oracles of the same pairs, the best-informed last",
    )
    analyse.add_argument("--tokenizer", metavar="MODEL", help="whose tokenizer the tables' tokens are")
    analyse.add_argument("--reference-logps", metavar="DIR", help="log-probabilities of the pairs, for the surprisal")
    analyse.add_argument("--gold", choices=["vader"], help="gold reward whose word values are the truth")
    analyse.add_argument("--k", type=float, default=0.3, help="share of key tokens to look at (default 0.3)")
    analyse.add_argument("--seed", type=int, default=0, help="seed of the random baseline (default 0)")
    analyse.add_argument("--out", metavar="DIR", help="folder of the results (default: analysis/ in the run)")

    command("recipe", recipe_command, "print every setting of a recipe with its default and meaning")

    oracle = command("oracle", oracle_command, "train an oracle: DPO on a reference model")
    oracle.add_argument("--reference", required=True, metavar="MODEL", help="model to start from")
    _data_options(oracle)
    _out_option(oracle, "folder for the oracle model")
    oracle.add_argument("--beta", type=float, default=0.1, help="DPO's KL strength (default 0.1)")
    _training_options(oracle)

    score = command("score", score_command, "score every response token: log oracle minus log reference")
    score.add_argument("--oracle", required=True, metavar="MODEL", help="model trained with DPO")
    score.add_argument("--reference", required=True, metavar="MODEL", help="the model it was trained from")
    _data_options(score)
    _out_option(score, "folder for the score table (pairs and log-probabilities are kept inside it)")
    score.add_argument("--tokens-per-row", type=int, help="token budget of a packed row; bounds the memory")
    _device_options(score)

    select = command("select", select_command, "select the key tokens of a score table")
    select.add_argument(
        "--table",
        action="append",
        required=True,
        metavar="DIR",
        help="score table, from `sepo score`; repeat for several oracles of the same pairs",
    )
    select.add_argument("--combine", choices=["mean", "min"], default="mean", help="how to join several (default mean)")
    select.add_argument("--k", type=float, default=0.3, help="share of tokens to keep on both sides (default 0.3)")
    select.add_argument("--k-chosen", type=float, help="share for chosen responses, instead of --k")
    select.add_argument("--k-rejected", type=float, help="share for rejected responses, instead of --k")
    select.add_argument("--include-end", action="store_true", help="let the end-of-response token be a key token")
    select.add_argument("--seed", type=int, default=0, help="seed of rule random (default 0)")
    _out_option(select, "folder for the selection table")
    select.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings as in a recipe's select section: rule_chosen=mass credit=soft ... (docs/selection.md)",
    )

    train = command("train", train_command, "train a policy on key tokens, or by a rival objective")
    train.add_argument("--policy", required=True, metavar="MODEL", help="model to align; needs the oracle's tokenizer")
    train.add_argument("--selection", required=True, metavar="DIR", help="selection table, from `sepo select`")
    _out_option(train, "folder for the trained policy")
    train.add_argument("--objective", default="sepo", help="the loss (default sepo); see docs/objectives.md")
    train.add_argument("--gamma", type=float, default=2.0, help="reward scale of sepo, simpo, confpo (default 2.0)")
    train.add_argument("--margin", type=float, default=0.0, help="target margin of the same (default 0)")
    train.add_argument("--beta", type=float, default=0.1, help="KL strength of dpo and its kin (default 0.1)")
    train.add_argument("--alpha", type=float, help="weight of the objective's second term (default: its paper's)")
    train.add_argument("--label-smoothing", type=float, default=0.0, help="probability of a flipped label (default 0)")
    _training_options(train)

    evaluate = command("eval", eval_command, "measure a policy against the model it started from")
    evaluate.add_argument("--policy", required=True, metavar="MODEL", help="trained model")
    evaluate.add_argument("--base", required=True, metavar="MODEL", help="the model it was trained from")
    _data_options(evaluate)
    _out_option(evaluate, "folder for metrics.json and generations.parquet")
    evaluate.add_argument("--gold", choices=["vader"], help="gold reward of the generations")
    evaluate.add_argument("--prompts", type=int, default=100, help="prompts to generate for (default 100)")
    evaluate.add_argument("--samples", type=int, default=1, help="generations a prompt (default 1)")
    evaluate.add_argument("--max-new-tokens", type=int, default=256, help="length limit (default 256)")
    _device_options(evaluate)

    report = command("report", report_command, "write the HTML report of a run or of any score table")
    report.add_argument("run", nargs="?", metavar="RUN", help="run folder")
    report.add_argument("--table", metavar="DIR", help="a score table instead of a run")
    report.add_argument("--tokenizer", metavar="MODEL", help="whose tokenizer to show the table's tokens with")
    report.add_argument("--out", metavar="FILE", help="HTML file (default: report.html in the run or beside the table)")
    report.add_argument("--figures", metavar="DIR", help="also save the figures there as PNG and SVG")
    report.add_argument("--max-pairs", type=int, default=5000, help="pairs to show at most (default 5000)")
    return parser


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"sepo {version('sepo')}"
    except PackageNotFoundError:
        return "sepo (not installed)"


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="SOURCE", help="hub id, folder or file of preference pairs")
    parser.add_argument("--split", default="train", help="split to read (default train)")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="ours=theirs",
        help="a column under another name, e.g. chosen=preferred; repeatable",
    )
    parser.add_argument("--as-chat", action="store_true", help="wrap plain-text prompts as one user turn")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of prompt and response (default 2048)")


def _out_option(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help=text)


def _device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:0, mps (default auto)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random draw (default 0)")


def _training_options(parser: argparse.ArgumentParser) -> None:
    _device_options(parser)
    parser.add_argument("--lora", type=int, metavar="RANK", help="train LoRA adapters of this rank")
    parser.add_argument(
        "training",
        nargs="*",
        metavar="key=value",
        help="training settings as in a recipe: learning_rate=5e-6 batch_size=64 num_train_epochs=1 ...",
    )


# --- commands -------------------------------------------------------------------------------------------------------


def run_command(arguments: argparse.Namespace) -> None:
    from sepo.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    _quiet_libraries()
    from sepo.pipeline import plan_run, run_recipe

    if arguments.dry_run:
        processes = _join("cpu")
        rows = processes.on_main(lambda: plan_run(recipe))
        if processes.is_main():
            print_plan(recipe.name, rows)
        return
    metrics = run_recipe(recipe)
    print_metrics(f"{recipe.name}: {recipe.run_folder}", metrics)


def compare_command(arguments: argparse.Namespace) -> None:
    from sepo.grid import load_grid

    grid, settings = load_grid(arguments.grid, arguments.overrides)
    _quiet_libraries()
    from sepo.compare import compare, plan_grid

    if arguments.dry_run:
        print_plan(grid.name, plan_grid(grid, settings))
        return
    compare(grid, settings)
    folder = grid.results_folder
    print((folder / "compare.md").read_text(encoding="utf-8"))
    print(f"{folder}/compare.md  compare.json  frontier.png")


def analyse_command(arguments: argparse.Namespace) -> None:
    from sepo.selection import check_rate

    check_rate("k", arguments.k)
    if arguments.run is None and (not arguments.table or arguments.out is None):
        raise UserError("analyse needs a run folder, or --table DIR and --out DIR: see `sepo analyse --help`")
    _quiet_libraries()
    from sepo.analyse import analyse, run_inputs

    inputs = run_inputs(
        None if arguments.run is None else Path(arguments.run),
        arguments.table,
        tokenizer=arguments.tokenizer,
        reference_logps=arguments.reference_logps,
        gold=arguments.gold,
    )
    out = Path(arguments.out) if arguments.out else Path(arguments.run) / "analysis"
    analyse(inputs, out, k=arguments.k, seed=arguments.seed)
    print((out / "analysis.md").read_text(encoding="utf-8"))


def recipe_command(arguments: argparse.Namespace) -> None:
    from sepo.recipe import describe_recipe

    print(describe_recipe())


def oracle_command(arguments: argparse.Namespace) -> None:
    training = _training_settings(arguments, "oracle")
    settings = _data_settings(arguments)
    _quiet_libraries()
    from sepo import stages
    from sepo.models import check_model, load_tokenizer, resolve_model

    _join(arguments.device)
    check_model(arguments.reference)
    reference = resolve_model(arguments.reference)
    pairs = stages.read_pairs(settings, load_tokenizer(reference))
    results = stages.train_model(
        reference,
        pairs,
        Path(arguments.out),
        training.training,
        lora=training.lora,
        seed=arguments.seed,
        device=arguments.device,
        objective="dpo",
        beta=training.beta,
    )
    print_metrics(f"oracle: {arguments.out}", {"pairs": len(pairs), **results})


def score_command(arguments: argparse.Namespace) -> None:
    settings = _data_settings(arguments)
    _quiet_libraries()
    from sepo import stages
    from sepo.models import check_model, load_tokenizer, resolve_model

    processes = _join(arguments.device)
    for name in (arguments.oracle, arguments.reference):
        check_model(name)
    oracle, reference = resolve_model(arguments.oracle), resolve_model(arguments.reference)
    tokenizer = load_tokenizer(reference)
    stages.check_same_tokenizer("oracle", load_tokenizer(oracle), "reference", tokenizer)
    out = Path(arguments.out)

    def write_pairs() -> int:
        pairs = stages.read_pairs(settings, tokenizer)
        stages.write_pairs(out / "pairs", pairs)
        return len(pairs)

    pairs = processes.on_main(write_pairs)
    stores = {
        role: stages.logps_pass(
            model,
            out / "pairs",
            out / "logps" / role,
            device=arguments.device,
            tokens_per_row=arguments.tokens_per_row,
            description=role,
        )
        for role, model in (("reference", reference), ("oracle", oracle))
    }
    processes.on_main(lambda: str(stages.score_pairs(out / "pairs", [stores["oracle"]], stores["reference"], out)))
    from sepo.evaluate.run import oracle_accuracy
    from sepo.tables import read_table

    print_metrics(f"scores: {out}", {"pairs": pairs, **oracle_accuracy(read_table(out, "scores"))})


def select_command(arguments: argparse.Namespace) -> None:
    from sepo.recipe import load_recipe
    from sepo.selection import check_rate

    rates = {
        side: arguments.k if getattr(arguments, f"k_{side}") is None else getattr(arguments, f"k_{side}")
        for side in ("chosen", "rejected")
    }
    for side, rate in rates.items():
        check_rate(f"k_{side}", rate)
    settings = load_recipe(None, [f"select.{item}" for item in arguments.overrides]).select.model_dump()
    settings |= {"k_chosen": rates["chosen"], "k_rejected": rates["rejected"]}
    settings["include_end"] |= arguments.include_end
    from sepo import stages
    from sepo.rewards import combine_scores
    from sepo.tables import flat, read_table, write_table

    out = Path(arguments.out)

    def write_selection() -> str:
        scores = Path(arguments.table[0])
        with tempfile.TemporaryDirectory() as folder:
            if len(arguments.table) > 1:
                joined = combine_scores([read_table(path, "scores") for path in arguments.table], arguments.combine)
                scores = Path(folder)
                write_table(scores, joined, stages.PAIRS_PER_SHARD)
            return str(stages.select(scores, out, **settings, seed=arguments.seed))

    _join("cpu").on_main(write_selection)
    table = read_table(arguments.out, "selection")
    metrics: dict[str, float] = {"pairs": len(table)}
    for side in ("chosen", "rejected"):
        kept, total = (int(flat(table.column(f"{side}_{part}"))[1].sum()) for part in ("positions", "ids"))
        metrics |= {f"{side}/tokens": total, f"{side}/key_tokens": kept, f"{side}/share": kept / total}
    print_metrics(f"selection: {arguments.out}", metrics)


def train_command(arguments: argparse.Namespace) -> None:
    policy = _training_settings(arguments, "policy")
    _quiet_libraries()
    from sepo import stages
    from sepo.models import check_model, load_tokenizer, resolve_model
    from sepo.objectives import check_objective
    from sepo.tables import read_table

    _join(arguments.device)
    check_objective(policy.objective, policy.label_smoothing)
    table = read_table(arguments.selection, "selection")
    check_model(arguments.policy)
    model = resolve_model(arguments.policy)
    stages.check_table_tokenizer(table, load_tokenizer(model), arguments.selection, arguments.policy)
    results = stages.train_model(
        model,
        table,
        Path(arguments.out),
        policy.training,
        lora=policy.lora,
        seed=arguments.seed,
        device=arguments.device,
        **stages.objective_settings(policy),
    )
    print_metrics(f"policy: {arguments.out}", {"pairs": len(table), **results})


def eval_command(arguments: argparse.Namespace) -> None:
    from sepo.recipe import parse_recipe

    settings = _data_settings(arguments)
    eval_settings = parse_recipe(
        {
            "eval": {
                "gold": arguments.gold,
                "prompts": arguments.prompts,
                "samples": arguments.samples,
                "max_new_tokens": arguments.max_new_tokens,
            }
        },
        "command line",
    ).eval
    _quiet_libraries()
    from sepo import stages
    from sepo.evaluate.run import evaluate_run
    from sepo.models import check_model, load_tokenizer, resolve_model
    from sepo.tables import write_metrics

    def measure() -> dict[str, float]:
        for name in (arguments.policy, arguments.base):
            check_model(name)
        policy, base = resolve_model(arguments.policy), resolve_model(arguments.base)
        tokenizer = load_tokenizer(base)
        stages.check_same_tokenizer("policy", load_tokenizer(policy), "base", tokenizer)
        stages.write_pairs(out / "pairs", stages.read_pairs(settings, tokenizer))
        metrics = evaluate_run(
            policy, base, out / "pairs", out, eval_settings, seed=arguments.seed, device=arguments.device
        )
        write_metrics(out / "metrics.json", metrics)
        return metrics

    out = Path(arguments.out)
    print_metrics(f"eval: {out}", _join("cpu").on_main(measure))


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
        from sepo.models import resolve_model

        tokenizer = Path(resolve_model(arguments.tokenizer))
    from sepo.report import build_report, save_figures

    source = run or table
    assert source is not None
    out = Path(arguments.out) if arguments.out else (run or source.parent) / "report.html"

    def write() -> None:
        print(build_report(run, table=table, tokenizer=tokenizer, out=out, max_pairs=arguments.max_pairs))
        if arguments.figures:
            for path in save_figures(source, Path(arguments.figures)):
                print(path)

    _join("cpu").on_main(write)


# --- helpers --------------------------------------------------------------------------------------------------------


def _data_settings(arguments: argparse.Namespace):
    from sepo.recipe import parse_recipe

    columns: dict[str, str] = {}
    for item in arguments.column:
        ours, equals, theirs = item.partition("=")
        if not equals or ours not in ("prompt", "chosen", "rejected") or not theirs:
            raise UserError(f"--column {item}: expected prompt=NAME, chosen=NAME or rejected=NAME")
        columns[ours] = theirs
    values = {
        "source": arguments.data,
        "split": arguments.split,
        "columns": columns,
        "as_chat": arguments.as_chat,
        "max_length": arguments.max_length,
    }
    return parse_recipe({"data": values}, "command line").data


def _training_settings(arguments: argparse.Namespace, section: str):
    """Check `key=value` training settings and flags against the recipe's section ("oracle" or "policy")."""
    from sepo.recipe import load_recipe

    overrides = [f"{section}.training.{item}" for item in arguments.training]
    for name in ("objective", "beta", "gamma", "margin", "alpha", "label_smoothing"):
        if getattr(arguments, name, None) is not None:
            overrides.append(f"{section}.{name}={getattr(arguments, name)}")
    if arguments.lora is not None:
        overrides.append(f"{section}.lora.r={arguments.lora}")
    return getattr(load_recipe(None, overrides), section)


def _join(device: str):
    """Meet the other processes of a launch (torchrun, accelerate launch); returns the module `processes`."""
    from sepo import processes

    processes.join(device)
    return processes


def _leave() -> None:
    if "sepo.processes" in sys.modules:
        sys.modules["sepo.processes"].leave()


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


def print_metrics(title: str, metrics: dict[str, Any]) -> None:
    """Print metrics as a table, grouped by the part of the name before the slash; `X_se` joins `X`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sepo import processes

    if not processes.is_main():
        return
    table = Table(title=Text(one_line(title)), title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("± s.e.", justify="right")
    previous = None
    for name, value in metrics.items():
        if name.endswith("_se") and name.removesuffix("_se") in metrics:
            continue
        group = name.split("/")[0]
        if previous is not None and group != previous:
            table.add_section()
        previous = group
        error = metrics.get(f"{name}_se")
        table.add_row(Text(name), _number(value), "" if error is None else _number(error))
    Console().print(table)


def print_plan(title: str, rows: list[dict[str, str]]) -> None:
    """Print the plan of a dry run as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"plan of {title}"), title_justify="left", show_edge=False, pad_edge=False)
    for name in rows[0]:
        right = name in ("pairs", "tokens", "runs", "time", "memory")
        table.add_column(name, justify="right" if right else "left")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row.values()))
    Console().print(table)


def _number(value: Any) -> str:
    if value is None or value != value:
        return "–"
    if not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
