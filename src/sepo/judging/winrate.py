"""Win rates of judged answers: raw with its standard error, and length-controlled as AlpacaEval 2 defines it.

A judgement is a preference in [1, 2]: 1 for the baseline's answer, 2 for the model's, values in between by the judge's
confidence, and 1.5 for a tie, which older files write as 0. The raw win rate is the mean of preference − 1.

Judges prefer long answers. The length-controlled win rate (Dubois et al. 2024, arXiv 2404.04475) is the prediction of a
logistic model of the preferences for two answers of equal length:

    P(win) = σ(w1·tanh(Δ/s) + w2·difficulty + w3·model),   Δ = length of the baseline's answer − the model's, in
                                                           characters, s its standard deviation over the prompts

The official fit needs two files that its authors publish (`GAMED`, `DIFFICULTY`). Its "minimal" form does without them
and has only the first and the last term. It extrapolates where all answers of the model are much shorter or longer.
A win rate does not measure quality: a constant answer that fools the judge wins (docs/judging.md).
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit

from sepo.errors import UserError, named_error
from sepo.evaluate.statistics import mean_and_se
from sepo.files import file_digest
from sepo.judging.logistic import FOLDS, fit_cross_validated

# The files of the dataset tatsu-lab/alpaca_eval that the official length-controlled win rate needs.
GAMED, DIFFICULTY = "df_gamed.csv", "instruction_difficulty.csv"
OFFICIAL_SHA256 = {
    GAMED: "97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d",
    DIFFICULTY: "e28d875bb334f75e17acd1e4ed659b261860e3db379cf5de29060301bed0a18b",
}
# Weight of the rows of the two models that were written to game the judge.
_GAMED_WEIGHT = 0.2 / 2
# Range of the mean length of the model's answers over the baseline's in which the minimal form was within one point of
# the published value, for all models that were tried.
SAFE_LENGTHS = (0.75, 1.34)
FEW = 100
_SAME_ANSWER = 0.5  # no model that reads the prompt gives this share of equal answers


class Judgement(NamedTuple):
    """A judged pair of answers to one prompt.

    Attributes:
        prompt: identifies the prompt; judgements of the same prompt are not independent.
        preference: in [1, 2]; NaN if unusable.
        baseline_length, model_length: characters of the answers; NaN if unknown.
        number: of the prompt in the benchmark, for its difficulty.
        answer: the model's answer, or its length, to detect a constant answer.
    """

    prompt: Hashable
    preference: float
    baseline_length: float = math.nan
    model_length: float = math.nan
    number: int | None = None
    answer: Hashable = None


@dataclass(frozen=True)
class OfficialData:
    """The data that the full length-controlled win rate needs beside the judgements.

    Attributes:
        features: `[rows, 3]` of the gamed baselines: tanh of the length difference, difficulty, 0.
        targets: `[rows]`, their preferences in [0, 1].
        weights: `[rows]`.
        difficulty: of each prompt, by its number in the benchmark.
    """

    features: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    difficulty: Mapping[int, float]


def preference_of(value: Any) -> float:
    """A preference in a file -> a number in [1, 2]; NaN for anything else.

    >>> preference_of("1.25"), preference_of(0), preference_of(None), preference_of(3)
    (1.25, 1.5, nan, nan)
    """
    number = number_of(value)
    if number == 0:
        return 1.5
    return number if 1 <= number <= 2 else math.nan


def number_of(value: Any) -> float:
    """A number, or its text, as a float; NaN for anything else, including true and false."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def judgement_of(row: Mapping[str, Any], number: int) -> Judgement:
    """The judgement in a row of AlpacaEval's columns, or with lengths instead of outputs; any column may be missing."""
    texts = [row.get(f"output_{side}") for side in (1, 2)]
    lengths = [
        float(len(text)) if isinstance(text, str) else _length(row.get(f"length_{side}"))
        for side, text in zip((1, 2), texts, strict=True)
    ]
    index = number_of(row.get("index"))
    prompt = row.get("instruction")
    whole = math.isfinite(index) and index == int(index)
    if not isinstance(prompt, str):
        prompt = ("index", int(index)) if whole else ("row", number)
    answer = texts[1] if isinstance(texts[1], str) else None if math.isnan(lengths[1]) else lengths[1]
    return Judgement(
        prompt, preference_of(row.get("preference")), lengths[0], lengths[1], int(index) if whole else None, answer
    )


def _length(value: Any) -> float:
    number = number_of(value)
    return number if 0 <= number < math.inf else math.nan


def win_rate(judgements: Sequence[Judgement]) -> dict[str, float | int]:
    """The raw win rate in per cent, as AlpacaEval's `get_winrate`.

    Returns:
        win_rate, and its standard_error clustered by prompt (s/√n, as published, if each prompt is judged once);
        discrete_win_rate, in which each preference counts fully for the side it favours; n_wins, n_wins_base, n_draws;
        n_total usable judgements of n_prompts prompts, and n_unusable others; avg_length of the model's answers in
        characters; length_ratio of avg_length to the baseline's.
    """
    values = np.array([judgement.preference for judgement in judgements], np.float64)
    usable = np.isfinite(values)
    wins = values[usable] - 1
    groups = [judgement.prompt for judgement, good in zip(judgements, usable, strict=True) if good]
    rate, error = mean_and_se(wins, groups)
    lengths = np.array([(one.baseline_length, one.model_length) for one in judgements]).reshape(-1, 2)
    known = np.isfinite(lengths).all(axis=1)
    written = lengths[np.isfinite(lengths[:, 1]), 1]
    base = lengths[known, 0].mean() if known.any() else 0.0
    return {
        "win_rate": 100 * rate,
        "standard_error": 100 * error,
        "discrete_win_rate": 100 * float(np.mean(0.5 * (1 + np.sign(wins - 0.5)))) if len(wins) else math.nan,
        "n_wins": int((wins > 0.5).sum()),
        "n_wins_base": int((wins < 0.5).sum()),
        "n_draws": int((wins == 0.5).sum()),
        "n_total": int(usable.sum()),
        "n_prompts": len(set(groups)),
        "n_unusable": int((~usable).sum()),
        "avg_length": float(written.mean()) if len(written) else math.nan,
        "length_ratio": float(lengths[known, 1].mean() / base) if base > 0 else math.nan,
    }


def length_controlled(
    judgements: Sequence[Judgement], official: OfficialData | None = None, same_model: bool = False
) -> dict[str, Any]:
    """The length-controlled win rate in per cent: minimal, or full with the official files.

    Judgements of the same two answers, as in both orders, count as one with their mean preference.

    Args:
        same_model: the model is the baseline, whose win rate against itself is 50 by definition.

    Returns:
        length_controlled_winrate; lc_standard_error, as published: the error of the mean prediction, which ignores the
        uncertainty of the fit (0 in the minimal form, so omitted there); lc_model, "minimal" or "full"; lc_strength,
        the C chosen by cross-validation; n_without_length, usable judgements left out for an unknown length. The win
        rate is NaN if fewer than five judgements are left.

    Raises:
        UserError: full, and a judgement has no number of the benchmark.
    """
    judgements = _one_for_each(judgements)
    known = [one for one in judgements if math.isfinite(one.baseline_length) and math.isfinite(one.model_length)]
    missing = sum(math.isfinite(one.preference) for one in judgements) - sum(
        math.isfinite(one.preference) for one in known
    )
    result: dict[str, Any] = {
        "length_controlled_winrate": math.nan,
        "lc_model": "minimal" if official is None else "full",
        "n_without_length": missing,
    }
    if same_model:
        return {**result, "length_controlled_winrate": 50.0}
    values = np.array([one.preference for one in known], np.float64) - 1
    usable = np.isfinite(values)
    if usable.sum() < FOLDS:
        return result
    difference = np.array([one.baseline_length - one.model_length for one in known])
    std = difference.std(ddof=1)
    length = np.tanh(difference / std) if np.ptp(difference) > 0 else np.zeros(len(known))
    ones = np.ones(len(known))
    if official is None:
        features = np.column_stack([length, ones])
        coefficients, strength = fit_cross_validated(features[usable], values[usable], ones[usable])
        return {**result, "length_controlled_winrate": 100 * float(expit(coefficients[1])), "lc_strength": strength}
    difficulty = np.array([_difficulty(one, official) for one in known])
    rows = np.column_stack([length, difficulty, ones])[usable]
    features = np.concatenate([official.features, rows])
    targets = np.concatenate([official.targets, values[usable]])
    weights = np.concatenate([official.weights, ones[usable]])
    coefficients, strength = fit_cross_validated(features, targets, weights)
    predicted = expit(coefficients[1] * difficulty + coefficients[2])
    mean, error = mean_and_se(predicted, [one.prompt for one in known])
    return {
        **result, "length_controlled_winrate": 100 * mean, "lc_standard_error": 100 * error, "lc_strength": strength,
    }  # fmt: skip


def _one_for_each(judgements: Sequence[Judgement]) -> list[Judgement]:
    """One judgement for each pair of answers, with the mean of the preferences that are in [1, 2]."""
    groups: dict[Hashable, list[Judgement]] = {}
    for one in judgements:
        lengths = [None if math.isnan(length) else length for length in (one.baseline_length, one.model_length)]
        groups.setdefault((one.prompt, *lengths, one.number, one.answer), []).append(one)
    merged = []
    for group in groups.values():
        usable = [one.preference for one in group if math.isfinite(one.preference)]
        merged.append(group[0]._replace(preference=sum(usable) / len(usable) if usable else math.nan))
    return merged


def _difficulty(judgement: Judgement, official: OfficialData) -> float:
    number = judgement.number
    if number is None or number not in official.difficulty:
        raise UserError(
            f"the full length-controlled win rate needs each row's `index` in AlpacaEval's set, found {number}: "
            "leave --glm-data out for the minimal one"
        )
    return official.difficulty[number]


def warnings_of(judgements: Sequence[Judgement], result: Mapping[str, Any]) -> list[str]:
    """Reasons to distrust these figures, one line each."""
    warnings = []
    total, unusable, without_length = result["n_total"], result["n_unusable"], result["n_without_length"]
    raw, controlled, ratio = result["win_rate"], result["length_controlled_winrate"], result["length_ratio"]
    fitted = math.isfinite(controlled)
    minimal = result["lc_model"] == "minimal" and fitted
    if unusable:
        warnings.append(f"{unusable} of {unusable + total} judgements have no preference in [1, 2] and are left out")
    if minimal and result["n_prompts"] < FEW:
        warnings.append(f"with {result['n_prompts']} prompts the penalised length-controlled fit is drawn towards 50")
    if without_length and total >= FOLDS:
        warnings.append(f"{without_length} judgements without both lengths are not in the length-controlled fit")
    low, high = SAFE_LENGTHS
    if minimal and math.isfinite(ratio) and not low <= ratio <= high:
        warnings.append(
            f"mean length is {ratio:.2f} of the baseline's: outside {low} to {high} the minimal length-controlled win "
            "rate extrapolates and was off by 4 to 9 points on average; the official files (--glm-data) do better"
        )
    if controlled < min(raw - raw / 4, raw - 10) or controlled > max(raw + (100 - raw) / 4, raw + 10):
        warnings.append(f"length control takes {raw:.1f} to {controlled:.1f}: the fit may have failed")
    answers = [judgement.answer for judgement in judgements if judgement.answer is not None]
    most = max(Counter(answers).values(), default=0)
    if len(answers) >= 20 and most > _SAME_ANSWER * len(answers):
        kind = "answers are the same text" if isinstance(answers[0], str) else "answers have the same length"
        warnings.append(f"{most} of {len(answers)} {kind}: it is written for the judge, not for the prompt")
    return warnings


def summarise(
    judgements: Sequence[Judgement], official: OfficialData | None = None, same_model: bool = False
) -> dict[str, Any]:
    """The figures of `win_rate` and `length_controlled`, and `warnings`."""
    result: dict[str, Any] = {**win_rate(judgements), **length_controlled(judgements, official, same_model)}
    return {**result, "warnings": warnings_of(judgements, result)}


def read_official(folder: Path) -> OfficialData:
    """Read the two files of the dataset `tatsu-lab/alpaca_eval` from a folder.

    Raises:
        UserError: a file is missing, is not the published one (by SHA-256), or lacks a column.
    """
    for name, expected in OFFICIAL_SHA256.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"'{path}' does not exist: expected {name} of the dataset tatsu-lab/alpaca_eval")
        if (digest := file_digest(path)) != expected:
            raise UserError(f"'{path}' is not the published file: its SHA-256 is {digest[:12]}…, not {expected[:12]}…")
    path = folder / GAMED
    features, targets, weights = [], [], []
    difficulty: dict[int, float] = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                index, hard = int(float(row["index"])), float(row["instruction_difficulty"])
                difficulty.setdefault(index, hard)
                preference = number_of(row["preference"])
                if math.isnan(preference):
                    continue
                is_model = row["not_gamed_baseline"].strip().lower() in ("true", "1", "1.0")
                features.append([math.tanh(float(row["std_delta_len"])), hard, float(is_model)])
                targets.append(preference)
                weights.append(1.0 if is_model else _GAMED_WEIGHT)
    except (KeyError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(
            f"'{path}' cannot be read ({named_error(error)}): expected the columns preference, index, std_delta_len, "
            "instruction_difficulty and not_gamed_baseline"
        ) from None
    return OfficialData(np.array(features).reshape(-1, 3), np.array(targets), np.array(weights), difficulty)
