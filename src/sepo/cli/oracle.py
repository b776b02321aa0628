"""`sepo oracle`: train an oracle without a recipe."""

from __future__ import annotations

import argparse

from sepo import command

HELP = "train an oracle: DPO on a reference model"


def add_options(parser: argparse.ArgumentParser) -> None:
    command.model_option(parser, "--reference", "model to start from")
    command.data_options(parser)
    command.out_option(parser, "folder for the oracle model")
    parser.add_argument("--beta", type=float, help="DPO's KL strength (default 0.1)")
    command.training_options(parser)


def run(arguments: argparse.Namespace) -> None:
    recipe = command.recipe_of(
        arguments, reference={"model": arguments.reference}, oracle=command.training_of(arguments), eval={"prompts": 0}
    )
    command.quiet_libraries()
    from sepo.api import extension_of
    from sepo.cli.walker import CommandWalker
    from sepo.runs.method import Method
    from sepo.runs.pipeline import check_method_pairs
    from sepo.stages import data, oracle, reference
    from sepo.training.checkpoints import check_model_folder

    with command.writing_to(arguments, check_model_folder) as out, command.work_folder(out) as work:
        processes = command.join(arguments.device)
        extension = extension_of(recipe)
        processes.on_main(lambda: [part.check(recipe) for part in (reference, oracle, data, extension)] and None)
        folders = {"data": work / "pairs", "oracle": out}
        folders |= dict.fromkeys(("reference_logps", "oracle_start_logps"), work / "logps")  # one of them is read
        walker = CommandWalker(folders)
        method = Method(recipe, walker, extension=extension)
        check_method_pairs(method)
        method.until("oracle")
    command.print_metrics(f"oracle: {arguments.out}", walker.results["oracle"].results)
