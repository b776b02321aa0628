"""Do values of tokens point at the wrong part of an answer?

Every measure is taken within an answer, so that answers of different length or topic are never compared:

    auc     P(a token of a wrong part has a lower value than a token of another part); chance 0.5
    found   1 if the part with the lowest mean value is wrong (without parts: the token with the lowest value);
            chance is the share of wrong parts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sepo.bench.marked.texts import Marked
from sepo.evaluate.statistics import mean_and_se
from sepo.report.statistics import auc, interval


class Reading(NamedTuple):
    """The tokens of one answer: begin and end of each in characters `[tokens, 2]`, and named values `[tokens]`."""

    places: np.ndarray
    values: Mapping[str, np.ndarray]


def measure(answers: Sequence[Marked], readings: Sequence[Reading | None]) -> dict[str, Any]:
    """Both measures of every value, and of `oracle` minus the best of the others; means over answers.

    Args:
        readings: of each answer; None where the tokens do not hold its text. Answers without a mistake are left out.

    Returns:
        `answers` that were measured, `chance` of `found`, and for each value and for "beyond" the mean, standard error
        and 95 % interval of `auc` and `found`.
    """
    names: list[str] = []
    rows: list[dict[str, tuple[float, float]]] = []
    chances: list[float] = []
    for answer, reading in zip(answers, readings, strict=True):
        if reading is None or not answer.wrong:
            continue
        wrong = _inside(reading.places, answer.wrong)
        judged = _inside(reading.places, answer.parts) if answer.parts else reading.places[:, 1] > reading.places[:, 0]
        if not (wrong & judged).any() or not (~wrong & judged).any():
            continue
        names = list(reading.values)
        rows.append({name: _of_answer(answer, reading, name, wrong, judged) for name in names})
        parts = len(answer.parts)
        chances.append(len(answer.wrong) / parts if parts else float(wrong[judged].mean()))
    if not rows:
        return {"answers": 0}
    table = np.array([[row[name] for name in names] for row in rows])  # [answers, values, 2]
    others = [index for index, name in enumerate(names) if name != "oracle"]
    own = names.index("oracle")
    result: dict[str, Any] = {"answers": len(rows), "chance": float(np.mean(chances))}
    for index, name in enumerate(names):
        result[name] = {measure: _summary(table[:, index, at]) for at, measure in enumerate(("auc", "found"))}
    best = [max(others, key=lambda index, at=at: table[:, index, at].mean()) for at in (0, 1)]  # type: ignore[misc]
    result["beyond"] = {
        measure: {**_summary(table[:, own, at] - table[:, best[at], at]), "best": names[best[at]]}
        for at, measure in enumerate(("auc", "found"))
    }
    return result


def _of_answer(
    answer: Marked, reading: Reading, name: str, wrong: np.ndarray, judged: np.ndarray
) -> tuple[float, float]:
    values = np.asarray(reading.values[name], np.float64)
    ranked = auc(-values[wrong & judged], -values[~wrong & judged])
    if not answer.parts:
        lowest = judged & (values == values[judged].min())
        return ranked, float(wrong[lowest].mean())
    means = [values[_inside(reading.places, [part])].mean() for part in answer.parts]
    lowest_parts = np.flatnonzero(np.array(means) == np.nanmin(means))
    return ranked, float(np.mean([answer.parts[index] in answer.wrong for index in lowest_parts]))


def _inside(places: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens lie in one of the spans, by their last character: a leading space belongs to the word."""
    last = places[:, 1] - 1
    inside = np.zeros(len(places), bool)
    for start, end in spans:
        inside |= (last >= start) & (last < end)
    return inside & (places[:, 1] > places[:, 0])


def _summary(values: np.ndarray) -> dict[str, Any]:
    mean, error = mean_and_se(values)
    return {"mean": mean, "se": error, "interval": interval(mean, error, len(values))}
