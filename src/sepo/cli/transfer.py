"""`sepo transfer`: token rewards under another tokenizer."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from sepo import command

HELP = "carry a score table over to a policy's tokenizer"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--table", type=command.path, required=True, metavar="DIR", help="score table, from `sepo score`"
    )
    command.data_options(parser)
    command.model_option(parser, "--tokenizer", "the policy, or any model with its tokenizer")
    parser.add_argument(
        "--table-tokenizer",
        type=command.path,
        metavar="MODEL",
        help="model with the tokenizer of the table (default: found beside the table)",
    )
    parser.add_argument(
        "--allocation",
        choices=["bytes", "group", "first"],
        help="how the reward that several tokens share is divided among the policy's tokens (default bytes)",
    )
    command.out_option(parser, "folder for the score table under the policy's tokenizer")


def run(arguments: argparse.Namespace) -> None:
    allocation = {} if arguments.allocation is None else {"allocation": arguments.allocation}
    recipe = command.recipe_of(arguments, policy={"model": arguments.tokenizer}, transfer=allocation)
    command.quiet_libraries()
    from sepo.data.tables import read_table
    from sepo.data.vocabulary import token_bytes
    from sepo.evaluate.accuracy import oracle_accuracy
    from sepo.models.tokenizer import load_tokenizer
    from sepo.stages import data
    from sepo.stages.transfer import carry_table, tokenizer_of_table

    def write_scores(out: Path) -> dict[str, float]:
        table = Path(arguments.table)
        source, name = tokenizer_of_table(table, arguments.table_tokenizer)
        data.check(recipe)
        target = load_tokenizer(arguments.tokenizer)
        readers = token_bytes(source, name), token_bytes(target, arguments.tokenizer)
        pairs = itertools.repeat(data.read_pairs(recipe.data, target))
        names = name, arguments.tokenizer
        report = carry_table(table, "scores", pairs, readers, out, recipe.transfer.allocation, names)
        target.save_pretrained(out / "tokenizer")
        processes.log(f"  {report.summary()}")
        return report.figures()

    with command.writing_to(arguments) as out:
        processes = command.join("cpu")
        figures = processes.on_main(lambda: write_scores(out))
    accuracy = oracle_accuracy(read_table(arguments.out, "scores"))
    command.print_metrics(f"scores: {arguments.out}", {**figures, **accuracy})
