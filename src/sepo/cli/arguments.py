"""The command line as argparse reads it: commands, options, their help."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn, get_args

from sepo.cli import commands
from sepo.errors import one_line
from sepo.files import expand_home
from sepo.recipe.settings import Gold

EPILOG = """\
the usual way:
  sepo run quickstart                           the whole job, offline, on the embedded model and data
  sepo run my.yaml --dry-run                    what would be done: plan, counts, time and memory
  sepo run my.yaml oracle.beta=0.05             with one setting changed
  sepo recipe                                   every setting with its default and meaning
  sepo recipe --list                            recipes that come along; `sepo recipe NAME` prints one
  sepo analyse runs/quickstart                  what the token rewards look like, and how far to trust them
  sepo compare objectives                       rival objectives at one budget, over seeds

stage by stage, without a recipe:
  sepo oracle --reference MODEL --data prefs.parquet --out oracle learning_rate=5e-6
  sepo score  --oracle oracle --reference MODEL --data prefs.parquet --out scores
  sepo transfer --table scores --data prefs.parquet --tokenizer POLICY --out scores-policy
                                                only for a policy with another tokenizer
  sepo select --table scores --k 0.3 --out selection
  sepo train  --policy MODEL --selection selection --out policy learning_rate=5e-6
  sepo eval   --policy policy --base MODEL --data held_out.parquet --out eval
  sepo report --table scores --tokenizer MODEL  every token coloured by its reward, in the browser
  sepo generate --model policy --prompts alpaca_eval.json --out answers
  sepo judge --answers mine.json --against theirs.json --judge reward:MODEL --out judged
  sepo push runs/mine --to ORG/NAME             to the hub, with a card (docs/how-to/share-on-the-hub.md)
  sepo winrate annotations.json                 win rate with its error, length-controlled (docs/judging.md)

MODEL is a hub id, a folder, a .gguf file, or package:PACKAGE/FILE.gguf. Data is a hub id, a folder or a
parquet, json, jsonl or csv file with the columns chosen, rejected and (unless both share it) prompt.
"""


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
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, work: Callable, text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(work=work)
        return sub

    run = command("run", commands.run_command, "run all stages of a recipe, reusing what stands")
    run.add_argument("recipe", type=_path, help="YAML file, or a name of `sepo recipe --list`")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, e.g. oracle.beta=0.2")
    run.add_argument("--dry-run", action="store_true", help="show plan, counts and estimates; train nothing")
    run.add_argument("--verbose", action="store_true", help="print all figures at the end, as they are in metrics.md")
    run.add_argument("--processes", type=int, metavar="N", help="with --dry-run: plan for N devices")
    run.add_argument(
        "--device-memory", type=float, metavar="GB", help="with --dry-run: say what fits on devices of this memory"
    )

    compare = command(
        "compare", commands.compare_command, "train every method of a grid at one budget and compare them"
    )
    compare.add_argument("grid", type=_path, help="YAML file, or a name of `sepo recipe --list`; see docs/compare.md")
    compare.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings to change in all variants, or of the grid: seeds=[1,2]",
    )
    compare.add_argument("--dry-run", action="store_true", help="show the runs and an estimate of time; train nothing")

    analyse = command(
        "analyse", commands.analyse_command, "say what token rewards look like, and how far they can be trusted"
    )
    analyse.add_argument(
        "run", type=_path, nargs="*", metavar="RUN",
        help="run folder: its scores, tokenizer and gold reward; several with --rules",
    )  # fmt: skip
    analyse.add_argument(
        "--table",
        type=_named_path,
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="a score table; repeat for several oracles of the same pairs, the best-informed last",
    )
    analyse.add_argument("--tokenizer", type=_path, metavar="MODEL", help="whose tokenizer the tables' tokens are")
    analyse.add_argument(
        "--reference-logps", type=_path, metavar="DIR", help="log-probabilities of the pairs, for the surprisal"
    )
    analyse.add_argument("--gold", choices=get_args(Gold), help="gold reward whose word values are the truth")
    analyse.add_argument("--k", type=float, default=0.3, help="share of key tokens to look at (default 0.3)")
    analyse.add_argument(
        "--rules", type=_path, nargs="?", const=True, metavar="FILE",
        help="rank selection rules on one or more oracles instead: those of a YAML file, NAME: {settings of select}, "
        "the one to compare with first; without a file those that come along",
    )  # fmt: skip
    analyse.add_argument("--seed", type=int, default=0, help="seed of the random baseline (default 0)")
    analyse.add_argument(
        "--out", type=_path, metavar="DIR", help="folder of the results (default: analysis/ in the run)"
    )

    recipe = command("recipe", commands.recipe_command, "print every setting of a recipe, or a recipe that comes along")
    shown = recipe.add_mutually_exclusive_group()
    shown.add_argument("name", nargs="?", help="print this built-in recipe: sepo recipe quickstart > mine.yaml")
    shown.add_argument("--list", action="store_true", help="the recipes and grids that come with the package")
    shown.add_argument("--schema", action="store_true", help="a JSON schema, from which editors complete")

    oracle = command("oracle", commands.oracle_command, "train an oracle: DPO on a reference model")
    oracle.add_argument("--reference", type=_path, required=True, metavar="MODEL", help="model to start from")
    _data_options(oracle)
    _out_option(oracle, "folder for the oracle model")
    oracle.add_argument("--beta", type=float, default=0.1, help="DPO's KL strength (default 0.1)")
    _training_options(oracle)

    score = command("score", commands.score_command, "score every response token: log oracle minus log reference")
    score.add_argument("--oracle", type=_path, required=True, metavar="MODEL", help="model trained with DPO")
    score.add_argument("--reference", type=_path, required=True, metavar="MODEL", help="the model it was trained from")
    _data_options(score)
    _out_option(score, "folder for the score table (pairs and log-probabilities are kept inside it)")
    score.add_argument("--tokens-per-row", type=int, help="token budget of a packed row; bounds the memory")
    _device_options(score)

    transfer = command("transfer", commands.transfer_command, "carry a score table over to a policy's own tokenizer")
    transfer.add_argument("--table", type=_path, required=True, metavar="DIR", help="score table, from `sepo score`")
    _data_options(transfer)
    transfer.add_argument(
        "--tokenizer", type=_path, required=True, metavar="MODEL", help="the policy, or any model with its tokenizer"
    )
    transfer.add_argument(
        "--table-tokenizer", type=_path, metavar="MODEL",
        help="whose tokenizer the table was made with (default: found beside the table)",
    )  # fmt: skip
    transfer.add_argument(
        "--allocation", choices=["bytes", "group", "first"], default="bytes",
        help="how a sum that several tokens share is divided among the policy's (default bytes)",
    )  # fmt: skip
    _out_option(transfer, "folder for the score table under the policy's tokenizer")

    select = command("select", commands.select_command, "select the key tokens of a score table")
    select.add_argument(
        "--table",
        type=_path,
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

    train = command("train", commands.train_command, "train a policy on key tokens, or by a rival objective")
    train.add_argument(
        "--policy", type=_path, required=True, metavar="MODEL", help="model to align; needs the selection's tokenizer"
    )
    train.add_argument(
        "--selection", type=_path, required=True, metavar="DIR", help="selection table, from `sepo select`"
    )
    _out_option(train, "folder for the trained policy")
    train.add_argument("--objective", default="sepo", help="the loss (default sepo); see docs/objectives.md")
    train.add_argument("--gamma", type=float, default=2.0, help="reward scale of sepo, simpo, confpo (default 2.0)")
    train.add_argument("--margin", type=float, default=0.0, help="target margin of the same (default 0)")
    train.add_argument("--beta", type=float, default=0.1, help="KL strength of dpo and its kin (default 0.1)")
    train.add_argument("--alpha", type=float, help="weight of the objective's second term (default: its paper's)")
    train.add_argument("--rate", type=float, help="share of a response's tokens that selective_dpo keeps (default 0.4)")
    train.add_argument("--label-smoothing", type=float, default=0.0, help="probability of a flipped label (default 0)")
    _training_options(train)

    evaluate = command("eval", commands.eval_command, "measure a policy against the model it started from")
    evaluate.add_argument("--policy", type=_path, required=True, metavar="MODEL", help="trained model")
    evaluate.add_argument("--base", type=_path, required=True, metavar="MODEL", help="the model it was trained from")
    _data_options(evaluate)
    _out_option(evaluate, "folder for metrics.json and generations.parquet")
    evaluate.add_argument("--gold", choices=get_args(Gold), help="gold reward of the generations")
    evaluate.add_argument(
        "--judge",
        metavar="JUDGE",
        help="reward:MODEL, oracle:FOLDER or function:MODULE:NAME compares the generations (docs/judging.md)",
    )
    _oracle_judge_options(evaluate)
    evaluate.add_argument("--prompts", type=int, default=100, help="prompts to generate for (default 100)")
    evaluate.add_argument("--samples", type=int, default=1, help="generations a prompt (default 1)")
    evaluate.add_argument("--max-new-tokens", type=int, default=256, help="length limit (default 256)")
    evaluate.add_argument("--batch-size", type=int, help="generations at a time (default: what the device holds)")
    _device_options(evaluate)

    winrate = command(
        "winrate", commands.winrate_command, "score judgements of anyone: AlpacaEval, MT-Bench or Arena-Hard"
    )
    winrate.add_argument(
        "files", type=_path, nargs="+", metavar="FILE", help="annotations.json, model_judgment/*.jsonl, ..."
    )
    winrate.add_argument("--json", type=_path, metavar="OUT", help="write all figures to this file")
    winrate.add_argument(
        "--glm-data",
        type=_path,
        metavar="DIR",
        help="folder of df_gamed.csv and instruction_difficulty.csv, for AlpacaEval's full length control",
    )
    winrate.add_argument(
        "--answers", type=_path, nargs="+", default=[], metavar="FILE", help="Arena-Hard's answers, for style control"
    )
    winrate.add_argument("--baseline", metavar="NAME", help="whom Arena-Hard's games are against")
    winrate.add_argument("--seed", type=int, default=0, help="seed of Arena-Hard's bootstrap (default 0)")

    generate = command(
        "generate", commands.generate_command, "answer the questions of a file or a benchmark, in the benchmark's form"
    )
    generate.add_argument(
        "--model", type=_path, required=True, metavar="MODEL", help="who answers; its name, with --server"
    )
    generate.add_argument(
        "--prompts",
        type=_path,
        required=True,
        metavar="FILE",
        help="questions: a file, or alpaca_eval, mt_bench, arena_hard",
    )
    _out_option(generate, "folder of the answers; the same command goes on where it stopped")
    generate.add_argument("--name", help="what the model is called in the answers (default: the last part of MODEL)")
    generate.add_argument("--max-new-tokens", type=int, default=2048, help="length limit of an answer (default 2048)")
    generate.add_argument(
        "--temperature", type=float, help="of sampling; 0 for the likeliest (default: the benchmark's)"
    )
    generate.add_argument("--limit", type=int, metavar="N", help="answer the first N questions only")
    generate.add_argument(
        "--chat-template", action="append", default=[], metavar="key=value", help="a keyword for the chat template"
    )
    generate.add_argument(
        "--engine", choices=["transformers", "vllm"], help="what runs the model (default transformers)"
    )
    generate.add_argument("--batch-size", type=int, help="answers at a time (default: what the device holds)")
    generate.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the weights")
    _device_options(generate)
    remote = generate.add_argument_group("a model behind a server")
    remote.add_argument("--server", metavar="URL", help="OpenAI-compatible server, such as http://localhost:8000/v1")
    remote.add_argument("--key-variable", metavar="NAME", help="variable that holds the key (default OPENAI_API_KEY)")
    remote.add_argument("--concurrency", type=int, help="requests at once (default 8)")
    remote.add_argument("--timeout", type=float, help="seconds of a request in all (default 300)")
    remote.add_argument("--retries", type=int, help="how often a question without a reply is asked again (default 6)")
    remote.add_argument("--cache", type=_path, metavar="DIR", help="folder of replies (default: the cache of sepo)")

    judge = command("judge", commands.judge_command, "judge answers: two models' against each other, or grade one's")
    judge.add_argument(
        "--answers", type=_path, required=True, metavar="FILE", help="answers of the model, in any benchmark's form"
    )
    judge.add_argument("--against", type=_path, metavar="FILE", help="answers of the baseline; without it, grades")
    judge.add_argument(
        "--judge",
        required=True,
        metavar="JUDGE",
        help="reward:MODEL, oracle:FOLDER, function:MODULE:NAME, or server:http://HOST/v1",
    )
    _oracle_judge_options(judge)
    _out_option(judge, "folder for annotations.json, scores.json and judging.json")
    judge.add_argument(
        "--questions", type=_path, metavar="FILE", help="question file, where the answers do not repeat it"
    )
    judge.add_argument(
        "--device", default="auto", help="of a reward model or an oracle: auto, cpu, cuda, cuda:0, mps (default auto)"
    )
    server = judge.add_argument_group("a judge behind a server")
    server.add_argument("--model-name", metavar="NAME", help="what the model is called there")
    server.add_argument(
        "--prompt", type=_path, metavar="FILE", help="the judge's words: the benchmark's txt, jsonl or yaml"
    )
    server.add_argument("--prompt-name", metavar="NAME", help="which prompt of a file with several")
    server.add_argument("--reference-answers", type=_path, metavar="FILE", help="right answers, for MT-Bench's grades")
    server.add_argument(
        "--order", choices=["both", "seeded"], help="both orders (default), or one as AlpacaEval draws it"
    )
    server.add_argument("--no-logprobs", dest="logprobs", action="store_const", const=False, help="do not ask for them")
    server.add_argument("--temperature", type=float, help="of the judge (default 0)")
    server.add_argument("--max-tokens", type=int, help="of a reply (default: 1 for a verdict of one token, else 2048)")
    server.add_argument("--key-variable", metavar="NAME", help="variable that holds the key (default OPENAI_API_KEY)")
    server.add_argument("--concurrency", type=int, help="requests at once (default 8)")
    server.add_argument("--timeout", type=float, help="seconds of a request in all (default 300)")
    server.add_argument("--retries", type=int, help="how often a question without a reply is asked again (default 6)")
    server.add_argument("--cache", type=_path, metavar="DIR", help="folder of replies (default: the cache of sepo)")
    server.add_argument("--retry-failed", action="store_true", help="ask again what has a malformed reply")
    server.add_argument(
        "--prices",
        type=float,
        nargs=2,
        metavar=("READ", "WRITTEN"),
        help="what a million tokens cost, for the estimate",
    )
    server.add_argument("--max-cost", type=float, help="ask nothing if it may cost more than this")
    server.add_argument("--dry-run", action="store_true", help="say how many calls, tokens and what cost; ask nothing")

    report = command("report", commands.report_command, "write the HTML report of a run or of any score table")
    report.add_argument("run", type=_path, nargs="?", metavar="RUN", help="run folder")
    report.add_argument("--table", type=_path, metavar="DIR", help="a score table instead of a run")
    report.add_argument(
        "--tokenizer", type=_path, metavar="MODEL", help="whose tokenizer to show the table's tokens with"
    )
    report.add_argument(
        "--out", type=_path, metavar="FILE", help="HTML file (default: report.html in the run or beside the table)"
    )
    report.add_argument("--figures", type=_path, metavar="DIR", help="also save the figures there as PNG and SVG")
    report.add_argument("--max-pairs", type=int, default=5000, help="pairs to show at most (default 5000)")

    push = command("push", commands.push_command, "upload a run's policy, oracle or token rewards to the hub")
    push.add_argument("run", type=_path, metavar="RUN", help="run folder")
    push.add_argument("--to", required=True, metavar="ORG/NAME", help="the repository; made if it is not there")
    push.add_argument(
        "--what",
        choices=["policy", "oracle", "scores"],
        default="policy",
        help="scores: every pair with its texts, token rewards and weights, as a dataset (default policy)",
    )
    push.add_argument("--private", action="store_true", help="a private repository (default: as ORG has it)")
    push.add_argument(
        "--base", metavar="ORG/NAME", help="hub id of the model it was trained from, if that was a folder"
    )
    push.add_argument("--license", metavar="NAME", help="for the card, as the hub spells it: apache-2.0, mit, ...")
    push.add_argument("--dry-run", action="store_true", help="show what would be uploaded; ask and write nothing")
    return parser


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"sepo {version('sepo')}"
    except PackageNotFoundError:
        return "sepo (not installed)"


def _path(text: str) -> str:
    """A path, or a name that may be one. Left to the shell, `--out=~/x` would make a folder called ~."""
    return expand_home(text)


def _named_path(text: str) -> str:
    """`[NAME=]PATH`."""
    name, equals, path = text.partition("=")
    return f"{name}={_path(path)}" if equals else _path(text)


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=_path, required=True, metavar="SOURCE", help="hub id, folder or file of preference pairs"
    )
    parser.add_argument("--split", default="train", help="split to read (default train)")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="ours=theirs",
        help="a column under another name, e.g. chosen=preferred; also of system, input, history, tools; repeatable",
    )
    parser.add_argument(
        "--pairs-from", metavar="NAME", help="make pairs of the labels or scores of a public dataset (docs/data.md)"
    )
    parser.add_argument("--as-chat", action="store_true", help="wrap plain-text prompts as one user turn")
    parser.add_argument(
        "--chat-template",
        action="append",
        default=[],
        metavar="key=value",
        help="a keyword for the chat template, e.g. enable_thinking=false; repeatable",
    )
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of prompt and response (default 2048)")


def _out_option(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--out", type=_path, required=True, metavar="DIR", help=text)


def _oracle_judge_options(parser: argparse.ArgumentParser) -> None:
    oracle = parser.add_argument_group("a judge that is an oracle", "where its folder does not say it")
    oracle.add_argument("--judge-reference", type=_path, metavar="MODEL", help="the model that it was trained from")
    oracle.add_argument("--judge-beta", type=float, metavar="BETA", help="beta of its DPO")


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
