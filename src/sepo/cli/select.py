"""`sepo select`: the key tokens of a score table."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from sepo.command import join, out_option, path, print_metrics, writing_to
from sepo.errors import UserError

HELP = "select the key tokens of a score table"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--table",
        type=path,
        action="append",
        required=True,
        metavar="DIR",
        help="score table, from `sepo score`; repeat for several oracles of the same pairs",
    )
    parser.add_argument("--combine", choices=["mean", "min"], default="mean", help="how to join several (default mean)")
    parser.add_argument("--k", type=float, help="share of tokens to keep on both sides (default 0.3)")
    parser.add_argument("--k-chosen", type=float, help="share for chosen responses, instead of --k")
    parser.add_argument("--k-rejected", type=float, help="share for rejected responses, instead of --k")
    parser.add_argument("--include-end", action="store_true", help="let the end-of-response token be a key token")
    parser.add_argument("--seed", type=int, default=0, help="seed of rule random (default 0)")
    out_option(parser, "folder for the selection table")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings as in a recipe's select section: rule_chosen=mass credit=soft ... (docs/selection.md)",
    )


def run(arguments: argparse.Namespace) -> None:
    settings = _settings_of(arguments)
    from sepo.credit.rewards import combine_scores
    from sepo.data.ragged import SIDES
    from sepo.data.tables import (
        check_shards_are_ours,
        iter_tables,
        number_of_rows,
        read_table,
        table_paths,
        write_table,
    )
    from sepo.stages.select import select, selected

    def write_selection(out: Path) -> str:
        scores = Path(arguments.table[0])
        with tempfile.TemporaryDirectory() as folder:
            if len(arguments.table) > 1:
                joined = combine_scores([read_table(path, "scores") for path in arguments.table], arguments.combine)
                scores = Path(folder)
                # Shards of the size of the first table's.
                rows = number_of_rows(table_paths(arguments.table[0], "scores")[0])
                write_table(scores, joined, max(rows, 1))
            return str(select(scores, out, **settings, seed=arguments.seed))

    with writing_to(arguments, check_shards_are_ours) as out:
        join("cpu").on_main(lambda: write_selection(out))
    counts, weights = selected(iter_tables(arguments.out, "selection"))
    metrics: dict[str, float] = {"pairs": counts["pairs"]}
    for side in SIDES:
        total, kept = counts[f"{side}/tokens"], counts[f"{side}/key_tokens"]
        metrics |= {f"{side}/tokens": total, f"{side}/key_tokens": kept, f"{side}/share": kept / total}
    print_metrics(f"selection: {arguments.out}", metrics | weights)


def _settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe's section "select", from options and `key=value`; a setting may have one of both spellings."""
    from sepo.credit.selection import check_rate
    from sepo.recipe.reading import load_recipe, parse_override

    options = {
        f"k_{side}": arguments.k if getattr(arguments, f"k_{side}") is None else getattr(arguments, f"k_{side}")
        for side in ("chosen", "rejected")
    }
    options = {name: value for name, value in options.items() if value is not None}
    for name, rate in options.items():
        check_rate(name, rate)
    if arguments.include_end:
        options["include_end"] = True
    for item in arguments.overrides:
        if (name := parse_override(item)[0]) in options:
            raise UserError(f"{item}: {name} is also set by an option (--k, --k-chosen, --k-rejected, --include-end)")
    settings = load_recipe(None, [f"select.{item}" for item in arguments.overrides]).select.model_dump()
    return settings | options
