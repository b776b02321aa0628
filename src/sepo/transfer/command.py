"""`sepo transfer`: token rewards under another tokenizer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sepo import command
from sepo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    command.engine_option(parser)


def run(arguments: argparse.Namespace) -> None:
    allocation = {} if arguments.allocation is None else {"allocation": arguments.allocation}
    recipe = command.recipe_of(arguments, policy={"model": arguments.tokenizer}, transfer=allocation)
    command.quiet_libraries()
    from sepo import engines
    from sepo.data.tables import check_shards_are_ours, iter_tables
    from sepo.data.vocabulary import token_bytes
    from sepo.evaluate.accuracy import oracle_accuracy
    from sepo.models.tokenizer import load_tokenizer
    from sepo.stages import data
    from sepo.transfer.stages import carry_units, write_targets

    def write_scores(out: Path, targets: Path) -> dict[str, float]:
        table = Path(arguments.table)
        if table.resolve() == out.resolve():
            raise UserError(f"'{out}' holds the table itself: choose another folder for what is carried over")
        source, name = _tokenizer_of_table(table, arguments.table_tokenizer)
        data.check(recipe)
        target = load_tokenizer(arguments.tokenizer)
        for tokenizer, model in ((source, name), (target, arguments.tokenizer)):
            token_bytes(tokenizer, model)  # refuses a tokenizer before the data are read
        pairs, found = data.read_source(recipe.data, recipe.data.split, target, out)
        data.log_reports({recipe.data.split: found})
        write_targets(table, pairs.matching, targets)
        named = [(name, None), (arguments.tokenizer, None)]
        report = carry_units(named, recipe.transfer.allocation, table, targets, out, "transfer")
        target.save_pretrained(out / "tokenizer")
        processes.log(f"  {report.summary()}")
        return report.figures()

    with (
        engines.use(arguments.engine, Path(arguments.out)),
        command.writing_to(arguments, check_shards_are_ours) as out,
        command.work_folder(out) as targets,
    ):
        processes = command.join("cpu")
        figures = processes.on_main(lambda: write_scores(out, targets))
    accuracy = oracle_accuracy(iter_tables(arguments.out, "scores"))
    command.print_metrics(f"scores: {arguments.out}", {**figures, **accuracy})


def _tokenizer_of_table(table: Path, given: str | None = None) -> tuple[PreTrainedTokenizerBase, str]:
    """Find the tokenizer of a score table; returns it and its name.

    Args:
        table: a folder, or a file in one.
        given: a model; default: the places where `sepo score` and `sepo run` put the tokenizer.

    Raises:
        UserError: there is none, or the given one differs.
    """
    from sepo.data.fingerprints import tokenizer_fingerprint
    from sepo.data.tables import provenance_of, read_schema, table_paths
    from sepo.models.tokenizer import has_tokenizer, load_tokenizer
    from sepo.recipe.reading import load_recipe

    made_with = provenance_of(read_schema(table_paths(table, "scores")[0])).get("tokenizer")
    folder = table if table.is_dir() else table.parent
    around = [folder / "tokenizer", *(folder.parent / name for name in ("oracle", "reference", "policy"))]
    places = [given] if given is not None else [str(place) for place in around if has_tokenizer(place)]
    if given is None and (recipe := folder.parent / "recipe.yaml").is_file():
        places.append(load_recipe(recipe).reference.model)
    for place in places:
        tokenizer = load_tokenizer(place)
        if made_with in (None, tokenizer_fingerprint(tokenizer)):
            return tokenizer, place
    if given is not None:
        raise UserError(f"'{table}' was made with another tokenizer than that of '{given}': name the oracle's model")
    raise UserError(
        f"the tokenizer of '{table}' is not beside it: name the oracle's model with --table-tokenizer MODEL"
    )
