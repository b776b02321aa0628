"""`sepo score`: the reward of every response token, without a recipe."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from sepo import command

HELP = "score every token of preference pairs or of any answers: log-probability under the oracle minus the reference's"


def add_options(parser: argparse.ArgumentParser) -> None:
    command.model_option(parser, "--oracle", "model trained with DPO")
    command.model_option(parser, "--reference", "model it started from")
    command.data_options(parser)
    command.out_option(parser, "folder for the score table; pairs and log-probabilities are kept in it")
    parser.add_argument("--tokens-per-row", type=int, help="token budget of a packed row; bounds the memory")
    command.engine_option(parser)
    command.device_options(parser)


def run(arguments: argparse.Namespace) -> None:
    recipe = command.recipe_of(
        arguments,
        reference={"model": arguments.reference},
        oracle={"model": arguments.oracle},
        eval={"prompts": 0},
        tokens_per_row=arguments.tokens_per_row,
    )
    command.quiet_libraries()
    from sepo import engines
    from sepo.cli.walker import CommandWalker
    from sepo.data.tables import check_shards_are_ours, clear_shards, iter_tables, number_of_rows, table_paths
    from sepo.evaluate.accuracy import oracle_accuracy
    from sepo.models.tokenizer import load_tokenizer
    from sepo.rewards.file import holds_answers, score_answers
    from sepo.runs.method import Method
    from sepo.runs.pipeline import check_method_pairs
    from sepo.stages import oracle, reference
    from sepo.stages.stage import SCORES

    engine = engines.use(arguments.engine, Path(arguments.out), passes=True)
    with engine, command.writing_to(arguments, check_shards_are_ours) as out:
        processes = command.join(arguments.device)
        processes.on_main(lambda: [stage.check(recipe) for stage in (reference, oracle)] and None)
        if processes.on_main(lambda: holds_answers(recipe)):
            command.print_metrics(f"scores of answers: {out}", score_answers(recipe, out))
            return
        folders = {"data": out / "pairs", "score": out / "table"}
        folders |= {f"{role}_logps": out / "logps" / role for role in ("reference", "oracle")}
        method = Method(recipe, CommandWalker(folders))
        check_method_pairs(method)
        table = method.scores.folder

        def publish() -> None:
            """The table is the folder itself, with its tokenizer for `sepo transfer` and `sepo report`."""
            clear_shards(out)
            for path in table_paths(table / SCORES, "scores"):
                path.replace(out / path.name)
            shutil.rmtree(table)
            load_tokenizer(arguments.reference).save_pretrained(out / "tokenizer")

        processes.on_main(publish)
    rows = sum(number_of_rows(path) for path in table_paths(out, "scores"))
    command.print_metrics(f"scores: {out}", {"pairs": rows, **oracle_accuracy(iter_tables(out, "scores"))})
