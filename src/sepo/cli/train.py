"""`sepo train`: train a policy on a selection, without a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sepo import command

if TYPE_CHECKING:
    import pyarrow as pa

    from sepo.recipe.settings import Recipe

HELP = "train a policy on key tokens, or by a rival objective"


def add_options(parser: argparse.ArgumentParser) -> None:
    command.model_option(parser, "--policy", "model to align, with the selection's tokenizer")
    parser.add_argument(
        "--selection", type=command.path, required=True, metavar="DIR", help="selection table, from `sepo select`"
    )
    command.out_option(parser, "folder for the trained policy")
    parser.add_argument("--objective", help="the loss (default sepo); see docs/objectives.md")
    parser.add_argument("--gamma", type=float, help="reward scale of sepo, simpo, confpo (default 2.0)")
    parser.add_argument("--margin", type=float, help="target margin of sepo, simpo, confpo (default 0)")
    parser.add_argument("--beta", type=float, help="KL strength of dpo and its relatives (default 0.1)")
    parser.add_argument("--alpha", type=float, help="weight of the objective's second term (default: its paper's)")
    parser.add_argument("--rate", type=float, help="share of a response's tokens for selective_dpo (default 0.4)")
    parser.add_argument("--label-smoothing", type=float, help="probability of a flipped label (default 0)")
    command.training_options(parser)


def run(arguments: argparse.Namespace) -> None:
    recipe = command.recipe_of(arguments, reference={"model": arguments.policy}, policy=command.training_of(arguments))
    policy = recipe.policy
    command.quiet_libraries()
    from sepo.api import extension_of
    from sepo.data.fingerprints import check_table_tokenizer
    from sepo.data.tables import read_table
    from sepo.models.names import resolve_model
    from sepo.models.tokenizer import load_tokenizer
    from sepo.stages import data, reference, train
    from sepo.training.checkpoints import check_model_folder
    from sepo.training.fit import objective_settings, train_model

    with command.writing_to(arguments, check_model_folder) as out, command.work_folder(out) as work:
        processes = command.join(arguments.device)
        checked = (reference, train, extension_of(recipe))
        processes.on_main(lambda: [part.check(recipe) for part in checked] and None)
        table = read_table(arguments.selection, "selection")
        model = resolve_model(arguments.policy)
        check_table_tokenizer(table, load_tokenizer(model), arguments.selection, arguments.policy)
        data.check_limits(recipe, [table])
        results = train_model(
            model,
            table,
            out,
            policy.training,
            reference_logps=_start_logps(recipe, model, Path(arguments.selection), work),
            lora=policy.lora,
            seed=recipe.seed,
            device=recipe.device,
            **objective_settings(policy),
        )
    command.print_metrics(f"policy: {arguments.out}", {"pairs": len(table), **results})


def _start_logps(recipe: Recipe, model: str, selection: Path, folder: Path) -> pa.Table | None:
    """Log-probabilities under the policy's start, stored in `folder`; None for an objective without a reference."""
    from sepo.data.tables import read_table
    from sepo.models.devices import choose_device
    from sepo.stages import logps, train
    from sepo.training.fit import training_types

    if not train.needs_reference(recipe):
        return None
    types = training_types(recipe.policy, model, choose_device(recipe.device).type)
    logps.logps_pass(model, selection, folder, device=recipe.device, types=types, description="policy_start")
    return read_table(folder, "logps")
