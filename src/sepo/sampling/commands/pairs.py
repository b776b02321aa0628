"""`sepo pairs`: preference pairs from sampled answers, with a data card."""

from __future__ import annotations

import argparse
from pathlib import Path

from sepo.command import out_option, path, writing_to
from sepo.errors import UserError, check_number

HELP = "make preference pairs of the answers that `sepo sample` wrote, with a data card"


def add_options(parser: argparse.ArgumentParser) -> None:
    from typing import get_args

    from sepo.recipe.settings import Pick

    parser.add_argument("--responses", type=path, metavar="DIR", help="scored answers, as `sepo sample` writes them")
    parser.add_argument("--pick", choices=get_args(Pick), default="best-worst", help="which pairs (default best-worst)")
    parser.add_argument("--min-gap", type=float, default=0.0, help="smallest difference of the scores (default 0)")
    parser.add_argument("--strong", type=path, metavar="DIR", help="answers of a strong model, chosen without a judge")
    parser.add_argument("--weak", type=path, metavar="DIR", help="answers of a weak model, rejected")
    parser.add_argument("--format", choices=["parquet", "jsonl"], default="parquet", help="default parquet")
    parser.add_argument("--seed", type=int, default=0, help="seed of best-random (default 0)")
    out_option(parser, "folder for the pairs: data for `sepo run`, and for `sepo push --what pairs`")


def run(arguments: argparse.Namespace) -> None:
    both = arguments.strong is not None and arguments.weak is not None
    if (arguments.responses is None) != both or (arguments.strong is None) != (arguments.weak is None):
        raise UserError("expected --responses DIR, or --strong DIR and --weak DIR")
    check_number("--min-gap", arguments.min_gap, least=0)
    check_number("--seed", arguments.seed, whole=True, least=0, below=2**32)
    from sepo.sampling.folder import lines_of, write_pairs_folder
    from sepo.sampling.pairs import pairs_of, strong_weak_pairs
    from sepo.sampling.responses import made_with, read_responses

    out = Path(arguments.out)
    if both:
        strong, weak = (read_responses(Path(place)) for place in (arguments.strong, arguments.weak))
        made, table, rule = strong_weak_pairs(strong, weak), None, "strong-weak"
        origin = {"chosen": made_with(strong), "rejected": made_with(weak)}
    else:
        table = read_responses(Path(arguments.responses))
        made, rule = pairs_of(table, arguments.pick, arguments.min_gap, arguments.seed), arguments.pick
        origin = {**made_with(table), "min_gap": arguments.min_gap}
    with writing_to(arguments, _check_folder):
        results = write_pairs_folder(out, made, table, origin, rule=rule, name=out.name, form=arguments.format)
    print("\n".join(lines_of(made, results)))
    print(f"{out}/data  pairs.json  README.md")


def _check_folder(out: Path) -> None:
    """Refuse a folder with other things in it, which would be read as data, too."""
    from sepo.sampling.folder import RECORD

    if out.is_dir() and not (out / RECORD).is_file() and any(not one.name.startswith(".") for one in out.iterdir()):
        raise UserError(f"'{out}' holds other files: choose a new --out")
