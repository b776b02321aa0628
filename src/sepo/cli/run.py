"""`sepo run`: all stages of a recipe, up to one of them, or only the plan."""

from __future__ import annotations

import argparse
import re
from typing import Any

from sepo.command import engine_option, join, path, print_metrics, print_plan, quiet_libraries
from sepo.errors import UserError

HELP = (
    "run all stages of a recipe into output_dir (default: runs/NAME of the recipe); the same command resumes an "
    "interrupted run, and results that are up to date are reused"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=path, help="YAML file, or a name from `sepo recipe --list`")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, e.g. oracle.beta=0.2")
    parser.add_argument(
        "--until",
        metavar="STAGE",
        help="stop after this stage: data, reference, oracle, score, select, train or eval; the same command without "
        "it does the rest",
    )
    engine_option(parser, None)
    parser.add_argument("--dry-run", action="store_true", help="show plan, counts and estimates; train nothing")
    parser.add_argument("--verbose", action="store_true", help="at the end, print every metric of metrics.md")
    parser.add_argument(
        "--processes", metavar="N", help="with --dry-run: plan for N devices, or for NODESxDEVICES such as 4x8"
    )
    parser.add_argument(
        "--device-memory", type=float, metavar="GB", help="with --dry-run: check what fits on devices of this memory"
    )
    parser.add_argument(
        "--device-tflops",
        type=float,
        metavar="T",
        help="with --dry-run: estimate times for devices that reach 10^12 T FLOPs a second in a whole stage",
    )


def run(arguments: argparse.Namespace) -> None:
    from sepo.recipe.reading import load_recipe

    overrides = list(arguments.overrides)
    if arguments.engine is not None:
        overrides.append(f"engine={arguments.engine}")
    recipe = load_recipe(arguments.recipe, overrides)
    target = _target_of(arguments)
    quiet_libraries("sepo.runs.pipeline")
    from sepo.api import plan_run, run_recipe

    if arguments.dry_run:
        from sepo.planning.plan import RunPlan, Target
        from sepo.stages.data import PAIRS_PER_SHARD

        processes = join("cpu")
        plan = RunPlan(**processes.on_main(lambda: vars(plan_run(recipe, Target(**target), arguments.until))))
        if processes.is_main():
            each = "" if recipe.rounds is None else f", each of {recipe.rounds.number} rounds"
            print_plan(f"plan of {recipe.name}{each}", plan.stages)
            if plan.memory:
                print_plan("memory of each device", plan.memory, wide=True)
            if plan.units:
                print_plan(f"passes as units of {PAIRS_PER_SHARD:,} pairs", plan.units)
            print("\n".join(["", *plan.notes]))
        return
    metrics = run_recipe(recipe, arguments.until)
    if not join(recipe.device).is_main():
        return
    if arguments.until is not None:
        print(f"{recipe.run_folder}: done up to '{arguments.until}'; the same command without --until does the rest")
        return
    if recipe.rounds is not None:
        from sepo.report.documents import print_document

        print_document((recipe.run_folder / "rounds.md").read_text(encoding="utf-8"))
        print(f"\n{recipe.run_folder}/rounds.html  rounds.json  round-1/ ...")
        return
    from sepo.report.run_summary import print_summary, summarise_run

    if arguments.verbose:
        print_metrics(f"{recipe.name}: {recipe.run_folder}", metrics)
    print_summary(summarise_run(recipe, metrics))


def _target_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The devices that a dry run plans for, as the fields of `planning.plan.Target`."""
    given, memory, tflops = arguments.processes, arguments.device_memory, arguments.device_tflops
    if not arguments.dry_run and (given, memory, tflops) != (None, None, None):
        raise UserError(
            "--processes, --device-memory and --device-tflops are for a --dry-run: add it, or leave them out"
        )
    match = re.fullmatch(r"(?:([1-9]\d{0,5})x)?([1-9]\d{0,5})", given or "1")
    if match is None:
        raise UserError(f"--processes {given}: expected the number of devices, 1 or more, or NODESxDEVICES such as 4x8")
    nodes = int(match[1] or 1)
    if memory is not None and not 0 < memory < 1e6:
        raise UserError(f"--device-memory {memory:g}: expected gigabytes of one device, such as 80")
    if tflops is not None and not 0 < tflops < 1e6:
        raise UserError(f"--device-tflops {tflops:g}: expected 10^12 FLOPs a second of one device, such as 400")
    return {
        "processes": nodes * int(match[2]),
        "memory": None if memory is None else 1e9 * memory,
        "nodes": nodes,
        "rate": None if tflops is None else 1e12 * tflops,
    }
