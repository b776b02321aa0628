"""`sepo oracle`: train an oracle without a recipe."""

from __future__ import annotations

import argparse

from sepo.command import (
    data_options,
    join,
    out_option,
    path,
    print_metrics,
    quiet_libraries,
    recipe_of,
    training_of,
    training_options,
    writing_to,
)

HELP = "train an oracle: DPO on a reference model"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reference", type=path, required=True, metavar="MODEL", help="model to start from")
    data_options(parser)
    out_option(parser, "folder for the oracle model")
    parser.add_argument("--beta", type=float, help="DPO's KL strength (default 0.1)")
    training_options(parser)


def run(arguments: argparse.Namespace) -> None:
    recipe = recipe_of(arguments, reference={"model": arguments.reference}, oracle=training_of(arguments))
    quiet_libraries()
    from sepo.models.names import resolve_model
    from sepo.models.tokenizer import load_tokenizer
    from sepo.stages import data, oracle, reference
    from sepo.training.checkpoints import check_model_folder
    from sepo.training.fit import train_model

    with writing_to(arguments, check_model_folder) as out:
        join(arguments.device).on_main(lambda: [stage.check(recipe) for stage in (reference, oracle, data)] and None)
        model = resolve_model(arguments.reference)
        pairs = data.read_pairs(recipe.data, load_tokenizer(model))
        data.check_limits(recipe, [pairs])
        results = train_model(
            model,
            pairs,
            out,
            recipe.oracle.training,
            lora=recipe.oracle.lora,
            seed=recipe.seed,
            device=recipe.device,
            objective="dpo",
            beta=recipe.oracle.beta,
        )
    print_metrics(f"oracle: {arguments.out}", {"pairs": len(pairs), **results})
