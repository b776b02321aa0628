"""`sepo bench laboratory`: what a DPO oracle's token rewards estimate, in a language that can be enumerated."""

from __future__ import annotations

import argparse
from pathlib import Path

from sepo.command import out_option, quiet_libraries
from sepo.errors import UserError
from sepo.files import check_writable
from sepo.report.documents import print_document

HELP = "measure what a DPO oracle's token rewards estimate, in a language small enough to enumerate"


def add_options(parser: argparse.ArgumentParser) -> None:
    out_option(parser, "folder of laboratory.md, laboratory.json and error.png")
    parser.add_argument(
        "--kinds", nargs="+", metavar="KIND",
        help="kinds of reward: local, state, late, order, parity, length (default all)",
    )  # fmt: skip
    parser.add_argument("--pairs", type=int, nargs="+", metavar="N", help="numbers of pairs (default 100 to 100,000)")
    parser.add_argument("--length", type=int, default=5, help="most tokens of a response, 1 to 6 (default 5)")
    parser.add_argument("--seeds", type=int, default=8, help="worlds of each kind, for the intervals (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random draw (default 0)")
    parser.add_argument("--beta", type=float, default=0.5, help="beta of DPO and of the truth (default 0.5)")
    parser.add_argument("--kl", type=float, default=0.2, help="compare policies at this KL, in nats (default 0.2)")


def run(arguments: argparse.Namespace) -> None:
    check_writable(Path(arguments.out))
    _check(arguments)
    quiet_libraries()
    from sepo.bench.laboratory.page import write_results
    from sepo.bench.laboratory.study import Settings, study
    from sepo.bench.laboratory.tree import KINDS

    for kind in arguments.kinds or ():
        if kind not in KINDS:
            raise UserError(f"--kinds {kind}: expected any of {', '.join(KINDS)}")
    given = {name: getattr(arguments, name) for name in ("length", "seeds", "seed", "beta", "kl")}
    if arguments.kinds:
        given["kinds"] = tuple(dict.fromkeys(arguments.kinds))
    if arguments.pairs:
        sizes = tuple(sorted(set(arguments.pairs)))
        given |= {"sizes": sizes, "policy_sizes": sizes[:3]}
    results = study(Settings(**given), done=lambda kind: print(f"{kind}: done", flush=True), processes=2)
    page = write_results(results, Path(arguments.out))
    print_document(page.read_text(encoding="utf-8"))
    print(f"\n{page}")


def _check(arguments: argparse.Namespace) -> None:
    if arguments.seeds < 2:
        raise UserError(f"--seeds {arguments.seeds}: expected 2 or more, for an interval")
    if not 1 <= arguments.length <= 6:
        raise UserError(f"--length {arguments.length}: expected 1 to 6")
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed}: expected 0 or more")
    for name in ("beta", "kl"):
        if not 0 < getattr(arguments, name) < 100:
            raise UserError(f"--{name} {getattr(arguments, name):g}: expected a number above 0 and below 100")
    for number in arguments.pairs or ():
        if not 10 <= number <= 10**9:
            raise UserError(f"--pairs {number}: expected 10 to 1,000,000,000")
