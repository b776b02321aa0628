"""`sepo winrate`: the scores that a benchmark defines, from a file of judgements."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from sepo.command import path, print_plan
from sepo.errors import UserError
from sepo.files import check_writable
from sepo.numbers import MISSING, number

HELP = "score judgements of any judge: AlpacaEval, MT-Bench or Arena-Hard"

# The figures that are printed, in their order, with their column names and formats.
_COLUMNS = {
    "win_rate": ("win rate, %", ".1f"), "score": ("score", ".2f"), "standard_error": ("± s.e.", ".2f"),
    "interval": ("95 % interval", ""), "length_controlled_winrate": ("length-controlled, %", ".1f"),
    "score_turn_1": ("turn 1", ".2f"), "score_turn_2": ("turn 2", ".2f"), "lower": ("5 %", ".1f"),
    "upper": ("95 %", ".1f"), "style_controlled": ("style-controlled", ".1f"), "n_total": ("judged", ",d"),
    "n_unusable": ("unusable", ",d"), "n_failed": ("failed", ",d"), "avg_length": ("characters", ".0f"),
}  # fmt: skip
# Titles of the tables, by the benchmark that defines the scores.
_TITLES = {
    "alpaca_eval": "Win rates, as AlpacaEval computes them", "mt_bench": "Scores, as MT-Bench computes them",
    "arena_hard": "Scores, as Arena-Hard computes them",
}  # fmt: skip
_NUMBERS = re.compile(r"\d+(\.\d+)?")


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
        print(arguments.json)


def print_scores(results: dict[str, dict[str, Any]]) -> None:
    """Print the scores of models, a table for each benchmark, and log their warnings, each kind once."""
    from sepo.processes import log

    for benchmark in dict.fromkeys(result["benchmark"] for result in results.values()):
        models = {name: _shown(result) for name, result in results.items() if result["benchmark"] == benchmark}
        columns = [name for name in _COLUMNS if any(figures[name] != MISSING for figures in models.values())]
        rows = [
            {"name": name, **{_COLUMNS[column][0]: figures[column] for column in columns}}
            for name, figures in models.items()
        ]
        print_plan(_TITLES.get(benchmark, f"Scores by {benchmark}"), rows)
    kinds: dict[str, list[tuple[str, str]]] = {}
    for name, result in results.items():
        for warning in result["warnings"]:
            kinds.setdefault(_NUMBERS.sub("#", warning), []).append((name, warning))
    for (name, warning), *others in kinds.values():
        log(f"{name}: {warning}")
        if others:
            log(f"  likewise, with numbers of their own: {', '.join(other for other, _ in others)}")


def _shown(result: dict[str, Any]) -> dict[str, str]:
    """The figures of a model as texts; those that it lacks are missing."""
    from sepo.report.edges import Measured  # it imports NumPy

    score = "win_rate" if "win_rate" in result else "score"
    # A win rate and Arena-Hard's score are per cent.
    share = score == "win_rate" or result["benchmark"] == "arena_hard"
    scale, form = (100, ".1f") if share else (1, ".2f")
    error = result.get("standard_error")
    error = None if error is None or error != error else error / scale
    value = Measured(result[score] / scale, error, result.get("n_prompts", result["n_total"]), share)
    figures = {name: number(result.get(name), form) for name, (_, form) in _COLUMNS.items()}
    if value.interval is not None:
        figures["interval"] = " to ".join(format(scale * bound, form) for bound in value.interval)
    if not value.spread:
        figures["standard_error"] = value.remark or MISSING
    return figures


def write_scores(file: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write scores as JSON: by name, or for a single model at the top, where readers look for `win_rate`."""
    from sepo.files import write_json

    write_json(file, next(iter(results.values())) if len(results) == 1 else results)
