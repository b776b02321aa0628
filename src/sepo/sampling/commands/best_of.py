"""`sepo best-of`: the best of n sampled answers, the baseline without training."""

from __future__ import annotations

import argparse
from pathlib import Path

from sepo.command import path, print_plan
from sepo.errors import UserError

HELP = "score the best of n sampled answers, a baseline without training"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--responses", type=path, required=True, metavar="DIR", help="scored answers of `sepo sample`; these choose"
    )
    parser.add_argument(
        "--measured", type=path, metavar="DIR", help="the same answers with the scores to report (default: those)"
    )
    parser.add_argument("--n", default="1,2,4,8", metavar="N[,N...]", help="sizes (default 1,2,4,8, up to the samples)")


def run(arguments: argparse.Namespace) -> None:
    try:
        sizes = [int(part) for part in arguments.n.split(",")]
    except ValueError:
        raise UserError(f"--n {arguments.n}: expected whole numbers such as 1,2,4,8") from None
    from sepo.numbers import number, with_error
    from sepo.sampling.best import best_of
    from sepo.sampling.responses import read_responses

    table = read_responses(Path(arguments.responses))
    measured = None if arguments.measured is None else read_responses(Path(arguments.measured))
    if arguments.n == "1,2,4,8":
        most = min((len(row) for row in table.column("answers").to_pylist()), default=1)
        sizes = [n for n in sizes if n <= most]
    rows = [
        {
            "best of": str(best.n),
            "KL at most, nats": number(best.kl, ".2f"),
            "score": with_error(best.score, best.score_se, ".3f"),
            "gain": with_error(best.gain, best.gain_se, "+.3f"),
            "tokens": number(best.tokens, ".1f"),
        }
        for best in best_of(table, sizes, measured)
    ]
    print_plan(f"best of n: {arguments.responses}", rows)
