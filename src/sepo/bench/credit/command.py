"""`sepo bench credit`: train every rule on tasks with known truth, and rank them by the headroom that they close."""

from __future__ import annotations

import argparse
from pathlib import Path

from sepo.command import named_values, path, quiet_libraries

HELP = "rank rules of token credit by the headroom that they close on tasks with known truth"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=path, required=True, help="folder of the results; the same command goes on there")
    parser.add_argument("--task", action="append", help="a task; repeat for several (default: the three planted ones)")
    parser.add_argument("--rule", action="append", help="a rule; repeat for several (default: all); see docs/bench.md")
    parser.add_argument("--seeds", type=int, default=6, help="seeds 1 to this number (default: %(default)s)")
    parser.add_argument(
        "--weights", action="append", default=[], metavar="NAME=FILE",
        help="a method of your own: parquet with pair_id and a list of weights for each side",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    from sepo.bench.credit.checks import CHECKS
    from sepo.bench.credit.grids import ALL, RULES, TASKS, TRUTH
    from sepo.bench.credit.run import run_bench
    from sepo.errors import UserError
    from sepo.files import check_writable
    from sepo.stages.score import check_rewards_file

    quiet_libraries()
    tasks = list(dict.fromkeys(arguments.task or CHECKS))
    rules = list(dict.fromkeys([ALL, TRUTH, *(arguments.rule or RULES)]))
    for kind, names, known in (("task", tasks, TASKS), ("rule", rules, RULES)):
        for name in names:
            if name not in known:
                raise UserError(f"--{kind} {name}: expected one of {', '.join(known)}")
    weights = {}
    for name, file in named_values("--weights", arguments.weights, "NAME=FILE").items():
        if name in RULES:
            raise UserError(f"--weights {name}={file}: expected NAME=FILE, with a name that no rule of the bench has")
        weights[name] = Path(file)
        check_rewards_file(weights[name], ("chosen_rewards", "rejected_rewards"))
    if weights and len(tasks) != 1:
        raise UserError("a table of weights belongs to the pairs of one task: name it with --task")
    if arguments.seeds < 3:
        raise UserError(f"--seeds {arguments.seeds}: expected 3 or more, or there is no interval")
    check_writable(Path(arguments.out))
    print(run_bench(tasks, rules, range(1, arguments.seeds + 1), Path(arguments.out), weights))
