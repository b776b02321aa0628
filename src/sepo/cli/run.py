"""`sepo run`: all stages of a recipe, up to one of them, or only the plan."""

from __future__ import annotations

import argparse

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
    parser.add_argument("--processes", type=int, metavar="N", help="with --dry-run: plan for N devices")
    parser.add_argument(
        "--device-memory", type=float, metavar="GB", help="with --dry-run: check what fits on devices of this memory"
    )


def run(arguments: argparse.Namespace) -> None:
    from sepo.recipe.reading import load_recipe

    overrides = list(arguments.overrides)
    if arguments.engine is not None:
        overrides.append(f"engine={arguments.engine}")
    recipe = load_recipe(arguments.recipe, overrides)
    devices, memory = _target_of(arguments)
    quiet_libraries("sepo.runs.pipeline")
    from sepo.api import plan_run, run_recipe

    if arguments.dry_run:
        from sepo.planning.plan import RunPlan, Target

        processes = join("cpu")
        plan = RunPlan(**processes.on_main(lambda: vars(plan_run(recipe, Target(devices, memory), arguments.until))))
        if processes.is_main():
            each = "" if recipe.rounds is None else f", each of {recipe.rounds.number} rounds"
            print_plan(f"plan of {recipe.name}{each}", plan.stages)
            if plan.memory:
                print_plan("memory of each device", plan.memory, wide=True)
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


def _target_of(arguments: argparse.Namespace) -> tuple[int, float | None]:
    """Number of devices that a dry run plans for, and bytes of each."""
    number, memory = arguments.processes, arguments.device_memory
    if (number is not None or memory is not None) and not arguments.dry_run:
        raise UserError("--processes and --device-memory are for a --dry-run: add it, or leave them out")
    if number is not None and number < 1:
        raise UserError(f"--processes {number}: expected the number of devices, 1 or more")
    if memory is not None and not 0 < memory < 1e6:
        raise UserError(f"--device-memory {memory:g}: expected gigabytes of one device, such as 80")
    return number or 1, None if memory is None else 1e9 * memory
