"""`sepo winrate`: the scores that a benchmark defines, from a file of judgements."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sepo.command import path, print_plan
from sepo.errors import UserError
from sepo.files import check_writable

HELP = "score judgements of any judge: AlpacaEval, MT-Bench or Arena-Hard"

# The figures that are printed, in their order, with their column names.
_COLUMNS = {
    "win_rate": "win rate", "score": "score", "standard_error": "± s.e.",
    "length_controlled_winrate": "length-controlled",
    "score_turn_1": "turn 1", "score_turn_2": "turn 2", "lower": "5 %", "upper": "95 %",
    "style_controlled": "style-controlled", "n_total": "judged", "n_unusable": "unusable", "n_failed": "failed",
    "avg_length": "characters",
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", type=path, nargs="+", metavar="FILE", help="annotations.json, model_judgment/*.jsonl, ..."
    )
    parser.add_argument("--json", type=path, metavar="OUT", help="write all figures to this file")
    parser.add_argument(
        "--glm-data",
        type=path,
        metavar="DIR",
        help="folder with df_gamed.csv and instruction_difficulty.csv, for AlpacaEval's full length control",
    )
    parser.add_argument(
        "--answers", type=path, nargs="+", default=[], metavar="FILE", help="Arena-Hard's answers, for style control"
    )
    parser.add_argument("--baseline", metavar="NAME", help="the opponent in Arena-Hard's games")
    parser.add_argument("--seed", type=int, default=0, help="seed of Arena-Hard's bootstrap (default 0)")


def run(arguments: argparse.Namespace) -> None:
    from sepo.judging.judgements import score_files
    from sepo.judging.winrate import read_official

    if arguments.json is not None:
        check_writable(Path(arguments.json).parent)
        if Path(arguments.json).is_dir():
            raise UserError(f"'{arguments.json}' is a folder: --json names the file to write")
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed}: expected 0 or more")
    official = None if arguments.glm_data is None else read_official(Path(arguments.glm_data))
    results = score_files(
        arguments.files, official=official, answers=arguments.answers, baseline=arguments.baseline, seed=arguments.seed
    )
    print_scores(results)
    if arguments.json is not None:
        write_scores(Path(arguments.json), results)


def print_scores(results: dict[str, dict[str, Any]]) -> None:
    """Print the scores of models, a table for each benchmark, and log their warnings."""
    from sepo.numbers import number
    from sepo.processes import log

    for benchmark in dict.fromkeys(result["benchmark"] for result in results.values()):
        models = {name: result for name, result in results.items() if result["benchmark"] == benchmark}
        shown = [key for key in _COLUMNS if any(key in result for result in models.values())]
        rows = [
            {"name": name, **{_COLUMNS[key]: number(result.get(key)) for key in shown}}
            for name, result in models.items()
        ]
        print_plan(benchmark, rows)
    for name, result in results.items():
        for warning in result["warnings"]:
            log(f"{name}: {warning}")


def write_scores(file: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write scores as JSON: by name, or for a single model at the top, where readers look for `win_rate`."""
    from sepo.files import write_json

    write_json(file, next(iter(results.values())) if len(results) == 1 else results)
