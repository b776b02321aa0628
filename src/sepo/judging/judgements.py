"""Files of judgements, by any judge -> the scores that their benchmark defines.

The columns show the benchmark: `preference` is AlpacaEval's, `games` Arena-Hard's, `g1_winner` MT-Bench's pairwise
comparison, and `score` with `turn` its grading of single answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sepo.errors import UserError, named_error
from sepo.judging import benchmark_scores
from sepo.judging.winrate import OfficialData, judgement_of, summarise

Row = Mapping[str, Any]
SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a json (a list), jsonl, parquet or csv file; a row that is no object becomes an empty one.

    Raises:
        UserError: the file is missing, has another format, is damaged, or holds no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"'{path}' does not exist: expected a file ending in {', '.join(SUFFIXES)}")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"'{path}' has an unknown format: expected a file ending in {', '.join(SUFFIXES)}")
    try:
        rows = _readers()[path.suffix.lower()](path)
    except (ValueError, OSError, RecursionError) as error:  # ArrowInvalid and JSON's are ValueErrors
        raise UserError(f"'{path}' cannot be read ({named_error(error)}): expected rows as {path.suffix}") from None
    if not isinstance(rows, list):
        raise UserError(f"'{path}' holds one {type(rows).__name__}: expected a list of rows")
    if not any(isinstance(row, Mapping) and row for row in rows):
        raise UserError(f"'{path}' holds no row: expected a list of objects")
    return [row if isinstance(row, Mapping) else {} for row in rows]


def _readers() -> dict[str, Callable[[Path], Any]]:
    return {".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet, ".csv": _read_csv}


def _read_json(path: Path) -> Any:
    text = path.read_text(encoding="utf-8-sig")
    try:
        return json.loads(text)
    except ValueError:
        if text.lstrip().startswith("{"):  # the content is jsonl
            return _rows_by_line(text, path)
        raise


def _read_jsonl(path: Path) -> list[Any]:
    return _rows_by_line(path.read_text(encoding="utf-8-sig"), path)


def _rows_by_line(text: str, path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut at U+2028 inside a text
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"'{path}' line {number} is not JSON ({named_error(error)})") from None
    return rows


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow.parquet as pq

    return pq.read_table(str(path)).to_pylist()


def _read_csv(path: Path) -> list[Any]:
    import csv

    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            return [{name: value for name, value in row.items() if name is not None} for row in csv.DictReader(file)]
        except csv.Error as error:
            raise ValueError(str(error)) from None


def score_files(
    paths: Sequence[str | Path],
    *,
    official: OfficialData | None = None,
    answers: Sequence[str | Path] = (),
    baseline: str | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Scores of all models in files of judgements, by name; `benchmark` in each is the benchmark that defines them.

    Args:
        official: AlpacaEval's two files, for its full length-controlled win rate.
        answers: Arena-Hard's files of answers, for style control, those of the baseline included.
        baseline: the opponent in Arena-Hard's games, if it is not the category's usual one.
        seed: of Arena-Hard's bootstrap.

    Raises:
        UserError: a file cannot be read, has an unknown format, or holds no usable judgement.
    """
    results: dict[str, dict[str, Any]] = {}
    arena: dict[str, dict[str, list[Row]]] = {}
    for path in map(Path, paths):
        rows = read_rows(path)
        if any("games" in row for row in rows):
            for row in rows:
                category = str(row.get("category") or "arena-hard-v0.1")
                arena.setdefault(category, {}).setdefault(_text(row, "model") or path.stem, []).append(row)
        else:
            for name, result in _scores_of(rows, path, official).items():
                results[_free(name, path, results)] = result
    return results | _arena_results(arena, _styles(answers) if answers else None, baseline, seed)


def _arena_results(
    arena: Mapping[str, Mapping[str, list[Row]]],
    styles: dict[str, dict[str, list[float]]] | None,
    baseline: str | None,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Scores of the models of each category of Arena-Hard."""
    results: dict[str, dict[str, Any]] = {}
    for category, models in arena.items():
        against = baseline or benchmark_scores.BASELINES.get(category)
        if styles is not None and (against is None or against not in styles):
            raise UserError(
                f"style control of '{category}' needs the answers of its baseline "
                f"({against or 'name it with --baseline'}) among --answers"
            )
        scores = benchmark_scores.arena_scores(models, styles, against, seed)
        for model, result in scores.items():
            if not result["n_total"]:
                raise UserError(f"no judgement of '{model}' in '{category}' has two verdicts such as 'A>B'")
            name = model if len(arena) == 1 else f"{model} ({category})"
            results[name] = {"benchmark": "arena_hard", "category": category, "baseline": against, **result}
    return results


def _scores_of(rows: Sequence[Row], path: Path, official: OfficialData | None) -> dict[str, dict[str, Any]]:
    if any("preference" in row for row in rows):
        return _alpaca_scores(rows, path, official)
    if any("g1_winner" in row for row in rows):
        models = dict.fromkeys(name for row in rows for name in (_text(row, "model_1"), _text(row, "model_2")) if name)
        results = {}
        for model in models:
            of_model = [row for row in rows if model in (row.get("model_1"), row.get("model_2"))]
            results[model] = {"benchmark": "mt_bench", **benchmark_scores.mt_bench_pair_scores(of_model, model)}
        return _usable(results, path, "a verdict model_1, model_2 or tie in both orders")
    if any("score" in row and "turn" in row for row in rows):
        groups: dict[str, list[Row]] = {}
        for row in rows:
            groups.setdefault(_text(row, "model") or path.stem, []).append(row)
        results = {
            model: {"benchmark": "mt_bench", **benchmark_scores.mt_bench_scores(group)}
            for model, group in groups.items()
        }
        return _usable(results, path, "a score from 0 to 10")
    raise UserError(
        f"'{path}' holds no known judgements: expected rows with preference (AlpacaEval), score and turn or g1_winner "
        "(MT-Bench), or games (Arena-Hard)"
    )


def _alpaca_scores(rows: Sequence[Row], path: Path, official: OfficialData | None) -> dict[str, dict[str, Any]]:
    # A row without a name belongs to the file's only model, baseline or judge.
    names = [_names(rows, columns) for columns in (("generator_2", "model"), ("generator_1",), ("annotator",))]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row, *key in zip(rows, *names, strict=True):
        groups.setdefault((key[0] or path.stem, *key[1:]), []).append(row)
    results = {}
    for (model, base, annotator), group in groups.items():
        # A model with several baselines or judges has a result for each.
        name = model
        if sum(key[0] == model for key in groups) > 1:
            parts = (model, f"against {base}" if base else "", f"by {annotator}" if annotator else "")
            name = " ".join(filter(None, parts))
        judgements = [judgement_of(row, i) for i, row in enumerate(group)]
        head = {"model": model, "baseline": base or None, "annotator": annotator or None}
        summary = summarise(judgements, official, same_model=bool(base) and base == model)
        results[name] = {"benchmark": "alpaca_eval", **head, **summary}
    return _usable(results, path, "a preference in [1, 2]")


def _names(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """The first text in these columns of each row; a row without one gets the file's only name, if it has only one."""
    names = [next((text for column in columns if (text := _text(row, column))), "") for row in rows]
    different = set(names) - {""}
    only = different.pop() if len(different) == 1 else ""
    return [name or only for name in names]


def _usable(results: dict[str, dict[str, Any]], path: Path, expected: str) -> dict[str, dict[str, Any]]:
    for model, result in results.items():
        if not result["n_total"]:
            raise UserError(f"'{path}': no judgement of '{model}' can be used; expected {expected}")
    return results


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    return value if isinstance(value, str) else ""


def _free(name: str, path: Path, taken: Mapping[str, Any]) -> str:
    """A name that no model of an earlier file has."""
    if name not in taken:
        return name
    name = f"{name} ({path})"
    number = 2
    while f"{name} {number}" in taken:
        number += 1
    return name if name not in taken else f"{name} {number}"


def _styles(paths: Sequence[str | Path]) -> dict[str, dict[str, list[float]]]:
    """The style of each answer in Arena-Hard's files, by model and question."""
    styles: dict[str, dict[str, list[float]]] = {}
    for path in map(Path, paths):
        for row in read_rows(path):
            metadata = row.get("metadata") or row.get("conv_metadata")
            style = benchmark_scores.style_of(metadata) if isinstance(metadata, Mapping) else None
            if style is not None and math.isfinite(style[0]):
                model = _text(row, "model") or _text(row, "model_id") or path.stem
                styles.setdefault(model, {})[str(row.get("uid", row.get("question_id")))] = style
    return styles
