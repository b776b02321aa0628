"""`sepo compare`: train every method of a grid at one budget and compare them."""

from __future__ import annotations

import argparse

from sepo.command import path, print_plan, quiet_libraries
from sepo.report.documents import print_document

HELP = "train every method of a grid at one budget and compare them"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("grid", type=path, help="YAML file, or a name from `sepo recipe --list`; see docs/compare.md")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings to change in all variants, or settings of the grid: seeds=[1,2]",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the runs and an estimate of time; train nothing")
    parser.add_argument("--retry-failed", action="store_true", help="train again the runs that diverged earlier")


def run(arguments: argparse.Namespace) -> None:
    from sepo.study.grid import load_grid

    grid, settings = load_grid(arguments.grid, arguments.overrides)
    quiet_libraries()
    if arguments.dry_run:
        from sepo.study.plan import plan_grid

        plan = plan_grid(grid, settings)
        print_plan(f"plan of {grid.name}", plan.rows)
        print("\n".join(["", *plan.example]))
        return
    from sepo.study.comparison import compare

    compare(grid, settings, retry_failed=arguments.retry_failed)
    folder = grid.results_folder
    print_document((folder / "compare.md").read_text(encoding="utf-8"))
    print(f"\n{folder}/compare.html  compare.md  compare.json  frontier.png")
