"""`sepo analyse`: what token rewards look like, and how far to trust them."""

from __future__ import annotations

import argparse
from pathlib import Path

from sepo.command import named_path, path, quiet_libraries
from sepo.errors import UserError
from sepo.files import check_writable
from sepo.report.documents import print_document

HELP = "show what token rewards look like, and how far to trust them"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", type=path, nargs="*", metavar="RUN",
        help="run folder with scores, tokenizer and gold reward; several folders with --rules",
    )  # fmt: skip
    parser.add_argument(
        "--table",
        type=named_path,
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="a score table; repeat for several oracles of the same pairs, the oracle with most data last",
    )
    parser.add_argument("--tokenizer", type=path, metavar="MODEL", help="model whose tokenizer made the tables' tokens")
    parser.add_argument(
        "--reference-logps",
        type=path,
        metavar="DIR",
        help="reference log-probabilities, for the surprisal",
    )
    parser.add_argument(
        "--gold",
        metavar="NAME",
        help="gold reward whose word values are the truth: vader, plain, or one that a package adds",
    )
    parser.add_argument("--k", type=float, default=0.3, help="share of key tokens (default 0.3)")
    parser.add_argument(
        "--rules", type=path, nargs="?", const=True, metavar="FILE",
        help="rank selection rules on one or more oracles instead: the rules of a YAML file, NAME: {settings of "
        "select}, the baseline first; without a file the built-in rules",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the random baseline (default 0)")
    parser.add_argument("--out", type=path, metavar="DIR", help="folder of the results (default: analysis/ in the run)")


def run(arguments: argparse.Namespace) -> None:
    from sepo.credit.selection import check_rate

    check_rate("k", arguments.k)
    runs = [Path(folder) for folder in arguments.run]
    if not runs and (not arguments.table or arguments.out is None):
        raise UserError("analyse needs a run folder, or --table DIR and --out DIR: see `sepo analyse --help`")
    if len(runs) > 1 and (arguments.rules is None or arguments.out is None):
        raise UserError("analyse takes several run folders with --rules and --out DIR: see `sepo analyse --help`")
    out = Path(arguments.out) if arguments.out else runs[0] / "analysis"
    check_writable(out)
    quiet_libraries()
    from sepo.analyse.analysis import analyse, rank, rank_inputs, read_rules, run_inputs

    if arguments.rules is not None:
        rules = read_rules(None if arguments.rules is True else Path(arguments.rules), arguments.k)
        oracles, gold = rank_inputs(runs, arguments.table, tokenizer=arguments.tokenizer, gold=arguments.gold)
        rank(oracles, rules, gold, out, seed=arguments.seed)
        print_document((out / "ranking.md").read_text(encoding="utf-8"))
        print(f"\n{out}/ranking.md")
        return
    inputs = run_inputs(
        runs[0] if runs else None,
        arguments.table,
        tokenizer=arguments.tokenizer,
        reference_logps=arguments.reference_logps,
        gold=arguments.gold,
    )
    analyse(inputs, out, k=arguments.k, seed=arguments.seed)
    print_document((out / "analysis.md").read_text(encoding="utf-8"))
    print(f"\n{out}/analysis.md")
