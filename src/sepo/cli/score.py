"""`sepo score`: the reward of every response token, without a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from sepo.command import (
    data_options,
    device_options,
    join,
    out_option,
    path,
    print_metrics,
    quiet_libraries,
    recipe_of,
    writing_to,
)

HELP = "score every response token: log-probability under the oracle minus that under the reference"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--oracle", type=path, required=True, metavar="MODEL", help="model trained with DPO")
    parser.add_argument("--reference", type=path, required=True, metavar="MODEL", help="the model it was trained from")
    data_options(parser)
    out_option(parser, "folder for the score table; pairs and log-probabilities are kept in it")
    parser.add_argument("--tokens-per-row", type=int, help="token budget of a packed row; bounds the memory")
    device_options(parser)


def run(arguments: argparse.Namespace) -> None:
    recipe = recipe_of(
        arguments,
        reference={"model": arguments.reference},
        oracle={"model": arguments.oracle},
        tokens_per_row=arguments.tokens_per_row,
    )
    quiet_libraries()
    from sepo.data.tables import read_table
    from sepo.evaluate.accuracy import oracle_accuracy
    from sepo.models.names import resolve_model
    from sepo.models.tokenizer import load_tokenizer
    from sepo.stages import data, oracle, reference
    from sepo.stages.logps import logps_pass, scoring_dtype
    from sepo.stages.score import score_pairs

    with writing_to(arguments) as out:
        processes = join(arguments.device)
        processes.on_main(lambda: [stage.check(recipe) for stage in (reference, oracle, data)] and None)
        models = {"reference": resolve_model(arguments.reference), "oracle": resolve_model(arguments.oracle)}

        def write_pairs() -> int:
            pairs = data.read_pairs(recipe.data, load_tokenizer(models["reference"]))
            data.check_limits(recipe, [pairs])
            data.write_pairs(out / "pairs", pairs)
            return len(pairs)

        def log_probabilities(role: str) -> Path:
            return logps_pass(
                models[role],
                out / "pairs",
                out / "logps" / role,
                device=recipe.device,
                dtype=scoring_dtype(recipe),
                tokens_per_row=recipe.tokens_per_row,
                description=role,
            )

        pairs = processes.on_main(write_pairs)
        stores = {role: log_probabilities(role) for role in models}
        processes.on_main(lambda: str(score_pairs(out / "pairs", [stores["oracle"]], stores["reference"], out)))
        # `sepo transfer` and `sepo report` find the tokenizer here.
        processes.on_main(lambda: str(load_tokenizer(models["reference"]).save_pretrained(out / "tokenizer")))
    print_metrics(f"scores: {out}", {"pairs": pairs, **oracle_accuracy(read_table(out, "scores"))})
