"""The commands, and the command line as argparse reads it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import NamedTuple, NoReturn

from sepo.errors import nearest, one_line

# The module of each command. Only the module of the command that was typed is imported.
COMMANDS = {
    "run": "sepo.cli.run",
    "compare": "sepo.study.command",
    "analyse": "sepo.analyse.command",
    "recipe": "sepo.cli.recipe",
    "oracle": "sepo.cli.oracle",
    "score": "sepo.cli.score",
    "transfer": "sepo.transfer.command",
    "select": "sepo.cli.select",
    "train": "sepo.cli.train",
    "eval": "sepo.cli.eval",
    "winrate": "sepo.judging.commands.winrate",
    "generate": "sepo.judging.commands.generate",
    "judge": "sepo.judging.commands.judge",
    "sample": "sepo.sampling.commands.sample",
    "pairs": "sepo.sampling.commands.pairs",
    "best-of": "sepo.sampling.commands.best_of",
    "report": "sepo.report.command",
    "reward": "sepo.rewards.command",
    "merge": "sepo.hub.merge",
    "push": "sepo.hub.command",
    "work": "sepo.engines.command",
    "bench": "sepo.bench.command",
}

EPILOG = """\
the usual way:
  sepo run quickstart                           the whole job, offline, on the embedded model and data
  sepo run my.yaml --dry-run                    what would be done: plan, counts, time and memory
  sepo run my.yaml oracle.beta=0.05             with one setting changed
  sepo run my.yaml --until score                up to the token rewards
  sepo recipe                                   every setting with its default and meaning
  sepo recipe --list                            the recipes of the package; `sepo recipe NAME` prints one
  sepo analyse runs/quickstart                  what the token rewards look like, and how far to trust them
  sepo compare objectives                       rival objectives at one budget, over seeds
  sepo bench laboratory --out laboratory        what token rewards estimate, where every truth is known

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
  sepo sample --model MODEL --prompts prompts.jsonl --gold vader --out sampled
  sepo pairs  --responses sampled --out pairs   preference data from a model's own answers
  sepo judge --answers mine.json --against theirs.json --judge reward:MODEL --out judged
  sepo reward --oracle oracle --reference MODEL --data reward-bench.parquet --out rewardbench
  sepo work runs/mine                           do units of a run with --engine files, on any machine
  sepo merge --adapter policy --out whole       one model folder, for tools that read no adapters
  sepo push runs/mine --to ORG/NAME             to the hub, with a card (docs/how-to/share-on-the-hub.md)
  sepo winrate annotations.json                 win rate with its error, length-controlled (docs/judging.md)

MODEL is a hub id, a folder, a .gguf file, or package:PACKAGE/FILE.gguf. Data is a hub id, a folder or a
parquet, json, jsonl or csv file with the columns chosen, rejected and (unless both share it) prompt.
"""


class Command(NamedTuple):
    """A command and its arguments."""

    module: ModuleType
    arguments: argparse.Namespace


def parse_arguments(argv: Sequence[str] | None) -> Command:
    """Parse the command line; `key=value` settings may come anywhere, also after options."""
    argv = list(sys.argv[1:] if argv is None else argv)
    typed = next((word for word in argv if not word.startswith("-")), None)
    parser = build_parser([typed] if typed in COMMANDS else list(COMMANDS))
    if typed is not None and typed not in COMMANDS:
        parser.error(f"there is no command '{typed}'{nearest(typed, COMMANDS)}: expected one of {', '.join(COMMANDS)}")
    arguments, rest = parser.parse_known_args(argv)
    settings = getattr(arguments, "overrides", getattr(arguments, "training", None))
    for item in rest:
        if settings is None or item.startswith("-") or "=" not in item:
            parser.error(f"unrecognized argument: {item}")
        settings.append(item)
    return Command(import_module(COMMANDS[arguments.command]), arguments)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))  # the message repeats what was typed, however long


def build_parser(names: Sequence[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """The parser of some commands."""
    parser = _Parser(
        prog="sepo",
        description="Selective preference optimization: align a model on the tokens that carry the preference.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in names:
        module = import_module(COMMANDS[name])
        text = module.HELP
        module.add_options(subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + "."))
    return parser


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"sepo {version('sepo')}"
    except PackageNotFoundError:
        return "sepo (not installed)"
