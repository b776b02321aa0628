"""Files of judgements, by any judge -> the scores that their benchmark defines.

The columns show the benchmark: `preference` is AlpacaEval's, `games` Arena-Hard's, `g1_winner` MT-Bench's pairwise
comparison, and `score` with `turn` its grading of single answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sepo.data import formats
from sepo.data.formats import EXPECTED
from sepo.errors import UserError, one_line
from sepo.judging import benchmark_scores
from sepo.judging.winrate import OfficialData, judgement_of, number_of, summarise

Row = Mapping[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a data file in any format (`sepo.data.formats`).

    Raises:
        UserError: the file is missing, has another format, is damaged, a pointer of Git LFS, or holds no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"'{path}' {'is a folder' if path.is_dir() else 'does not exist'}: expected {EXPECTED}")
    rows = formats.read_rows(path)
    if not any(rows):
        raise UserError(f"'{path}' holds no row: expected a list of objects")
    return list(rows)


_TOO_LOW = "no preference is above 1, but AlpacaEval's go from 1 (the baseline) to 2 (the model), and 0 is a tie"


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
    arena: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for path in map(Path, paths):
        rows = read_rows(path)
        if any("games" in row for row in rows):
            for row in rows:
                group = (str(row.get("category") or "arena-hard-v0.1"), _judge(row), _text(row, "baseline"))
                arena.setdefault(group, {}).setdefault(_text(row, "model") or path.stem, []).append(row)
        else:
            for name, result in _scores_of(rows, path, official).items():
                results[_free(name, path, results)] = result
    return results | _arena_results(arena, _styles(answers) if answers else None, baseline, seed)


def _arena_results(
    arena: Mapping[tuple[str, str, str], Mapping[str, list[Row]]],
    styles: dict[str, dict[str, list[float]]] | None,
    baseline: str | None,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Scores of the models of each category of Arena-Hard, by each judge, against each baseline."""
    results: dict[str, dict[str, Any]] = {}
    categories, judges, baselines = ({group[i] for group in arena} for i in (0, 1, 2))
    for (category, judge, named), models in arena.items():
        for model, rows in models.items():
            _check_once(rows, f"the judgements of '{model}'", "uid", "question_id")
        if baseline is not None and named and named != baseline:
            raise UserError(f"--baseline {baseline}, but the judgements name '{one_line(named, 60)}': leave it out")
        against = named or baseline or benchmark_scores.BASELINES.get(category)
        if styles is not None and (against is None or against not in styles):
            raise UserError(
                f"style control of '{category}' needs the answers of its baseline "
                f"({against or 'name it with --baseline'}) among --answers"
            )
        scores = benchmark_scores.arena_scores(models, styles, against, seed)
        for model, result in scores.items():
            if not result["n_total"]:
                raise UserError(f"no judgement of '{model}' in '{category}' has two verdicts such as 'A>B'")
            name = f"{model} ({category})" if len(categories) > 1 else model
            name = f"{name} against {against}" if len(baselines) > 1 else name
            name = f"{name} by {judge or 'an unnamed judge'}" if len(judges) > 1 else name
            head = {"benchmark": "arena_hard", "category": category, "judge": judge or None, "baseline": against}
            results[name] = {**head, **result}
    return results


def _scores_of(rows: Sequence[Row], path: Path, official: OfficialData | None) -> dict[str, dict[str, Any]]:
    if any("preference" in row for row in rows):
        return _alpaca_scores(rows, path, official)
    if any("g1_winner" in row for row in rows):
        return _usable(_bench_pair_scores(rows, path), path, "a verdict model_1, model_2 or tie in both orders")
    if any("score" in row and "turn" in row for row in rows):
        return _usable(_bench_scores(rows, path), path, "a score from 0 to 10")
    raise UserError(
        f"'{path}' holds no known judgements: expected rows with preference (AlpacaEval), score and turn or g1_winner "
        "(MT-Bench), or games (Arena-Hard)"
    )


def _bench_scores(rows: Sequence[Row], path: Path) -> dict[str, dict[str, Any]]:
    """MT-Bench's grades of each model by each judge."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((_text(row, "model") or path.stem, _judge(row)), []).append(row)
    results = {}
    for (model, judge), group in groups.items():
        _check_once(group, f"'{path}'", "question_id", and_turn=True)
        name = _by_judge(model, judge, groups)
        results[name] = {"benchmark": "mt_bench", "judge": judge or None, **benchmark_scores.mt_bench_scores(group)}
    return results


def _bench_pair_scores(rows: Sequence[Row], path: Path) -> dict[str, dict[str, Any]]:
    """MT-Bench's pairwise win rates of each model by each judge."""
    groups: dict[tuple[str, str], list[Row]] = {}
    pairs: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        names = [name for name in (_text(row, "model_1"), _text(row, "model_2")) if name]
        if len(names) > len(set(names)):
            raise UserError(f"'{path}' compares '{one_line(names[0], 60)}' with itself: leave those rows out")
        pairs.setdefault((_judge(row), *sorted(names)), []).append(row)
        for name in names:
            groups.setdefault((name, _judge(row)), []).append(row)
    for group in pairs.values():
        _check_once(group, f"'{path}'", "question_id", and_turn=True)
    return {
        _by_judge(model, judge, groups): {
            "benchmark": "mt_bench",
            "judge": judge or None,
            **benchmark_scores.mt_bench_pair_scores(group, model),
        }
        for (model, judge), group in groups.items()
    }


def _judge(row: Row) -> str:
    """The judge of a row of MT-Bench or Arena-Hard; FastChat writes a list of the judge and its prompt."""
    judge = row.get("judge")
    judge = judge[0] if isinstance(judge, list | tuple) and judge else judge
    return judge if isinstance(judge, str) else ""


def _by_judge(model: str, judge: str, groups: Mapping[tuple[str, str], Any]) -> str:
    """The name of a result: of the model, and of the judge if there are several."""
    several = sum(name == model for name, _ in groups) > 1
    return f"{model} by {judge or 'an unnamed judge'}" if several else model


def _check_once(rows: Sequence[Row], where: str, *names: str, and_turn: bool = False) -> None:
    """Raise a UserError if one judge judges a question (or a turn of it) twice."""
    seen = set()
    for row in rows:
        question = next((row[name] for name in names if row.get(name) is not None), None)
        key = (str(question), str(row.get("turn")) if and_turn else "")
        if question is not None and key in seen:
            raise UserError(
                f"{where} hold question {one_line(question, 60)} twice by one judge: leave one of the two out"
            )
        seen.add(key)


def _alpaca_scores(rows: Sequence[Row], path: Path, official: OfficialData | None) -> dict[str, dict[str, Any]]:
    # A row without a name belongs to the file's only model, baseline or judge.
    names = [_names(rows, columns) for columns in (("generator_2", "model"), ("generator_1",), ("annotator",))]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row, *key in zip(rows, *names, strict=True):
        groups.setdefault((key[0] or path.stem, *key[1:]), []).append(row)
    given = [value for row in rows if math.isfinite(value := number_of(row.get("preference")))]
    too_low = bool(given) and max(given) <= 1
    if too_low and any(0 < value < 1 for value in given):
        raise UserError(f"'{path}': {_TOO_LOW}; these are in [0, 1]: add 1 to the share of the model")
    outside = [value for value in given if not 0 <= value <= 2]
    if 3 * len(outside) >= len(given) > 0 or (too_low and outside):
        raise UserError(
            f"'{path}': preferences of {min(given):g} to {max(given):g}, but AlpacaEval's from 1 (the baseline) to "
            "2 (the model), and 0 is a tie: convert them"
        )
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
        summary["warnings"] += [_TOO_LOW] * too_low
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
