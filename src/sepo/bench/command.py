"""`sepo bench`: tests of token credit, one action each."""

from __future__ import annotations

import argparse
from importlib import import_module

HELP = "test token credit where its truth is known"

# The module of each action, with HELP, add_options(parser) and run(arguments) as a command has them.
ACTIONS = {
    "credit": "sepo.bench.credit.command",
    "laboratory": "sepo.bench.laboratory.command",
    "marked": "sepo.bench.marked.command",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, module_name in ACTIONS.items():
        module = import_module(module_name)
        text = module.HELP
        module.add_options(actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + "."))


def run(arguments: argparse.Namespace) -> None:
    import_module(ACTIONS[arguments.action]).run(arguments)
