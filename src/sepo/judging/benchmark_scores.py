"""Scores of MT-Bench and Arena-Hard as the benchmarks define them. Replies without a verdict are counted.

MT-Bench (Zheng et al. 2023, arXiv 2306.05685): a judge grades each turn from 1 to 10; the score is the mean over turns.
Arena-Hard (Li et al. 2024, arXiv 2406.11939): a judge compares each answer with a baseline's twice, in both orders; the
score is the share of games won, in which `A>>B` counts three times. Style control is the strength of a model in a
Bradley-Terry regression that also has the differences in length and Markdown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from sepo.evaluate.statistics import mean_and_se
from sepo.judging.logistic import fit_logistic
from sepo.judging.winrate import number_of

# The outcome of a verdict for the answer called A, once for each game that the verdict counts as.
_DECISIVE = 3
VERDICTS = {
    "A>>B": [1.0] * _DECISIVE, "A>B": [1.0], "A=B": [0.5], "A<B": [0.0], "A<<B": [0.0] * _DECISIVE,
    "B>>A": [0.0] * _DECISIVE, "B>A": [0.0], "B=A": [0.5], "B<A": [1.0], "B<<A": [1.0] * _DECISIVE,
}  # fmt: skip
# The opponent of a category's games.
BASELINES = {
    "hard_prompt": "o3-mini-2025-01-31",
    "coding": "o3-mini-2025-01-31",
    "math": "o3-mini-2025-01-31",
    "creative_writing": "gemini-2.0-flash-001",
    "arena-hard-v0.1": "gpt-4-0314",
}
_ROUNDS = 100


def mt_bench_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean grade over all turns of one model, with its standard error clustered by question.

    A missing grade (−1 in FastChat's files, or none) is left out and counted, never read as 0.

    Args:
        rows: of a FastChat judgement file: question_id, score, turn.
    """
    grades = np.array([_grade(row.get("score")) for row in rows], np.float64)
    good = np.isfinite(grades)
    turns = [number_of(row.get("turn")) for row in rows]
    groups = [str(row.get("question_id")) for row in rows]
    mean, error = mean_and_se(grades[good], [group for group, keep in zip(groups, good, strict=True) if keep])
    result: dict[str, Any] = {"score": mean, "standard_error": error}
    for turn in sorted({turn for turn in turns if math.isfinite(turn)}):
        of_turn = good & (np.array(turns) == turn)
        result[f"score_turn_{int(turn)}"] = float(grades[of_turn].mean()) if of_turn.any() else math.nan
    failed = int((~good).sum())
    warned = [f"{failed} of {len(rows)} turns have no grade and are left out, not counted as 0"] if failed else []
    prompts = len({group for group, keep in zip(groups, good, strict=True) if keep})
    return {**result, "n_total": int(good.sum()), "n_prompts": prompts, "n_failed": failed, "warnings": warned}


def _grade(value: Any) -> float:
    number = number_of(value)
    return number if 0 <= number <= 10 else math.nan


def mt_bench_pair_scores(rows: Sequence[Mapping[str, Any]], model: str) -> dict[str, Any]:
    """Win rate of a model in FastChat's pairwise judgements, in per cent.

    A pair whose two orders disagree is a tie. A pair without a verdict is left out and counted.
    """
    values, groups = [], []
    failed = 0
    for row in rows:
        first, second = row.get("g1_winner"), row.get("g2_winner")
        if not {first, second} <= {"model_1", "model_2", "tie"}:
            failed += 1
            continue
        ours = "model_1" if row.get("model_1") == model else "model_2"
        values.append(0.5 if first != second or first == "tie" else float(first == ours))
        groups.append(str(row.get("question_id")))
    mean, error = mean_and_se(values, groups)
    warned = [f"{failed} of {len(rows)} pairs have no verdict and are left out"] if failed else []
    return {
        "win_rate": 100 * mean, "standard_error": 100 * error, "n_total": len(values), "n_prompts": len(set(groups)),
        "n_failed": failed, "warnings": warned,
    }  # fmt: skip


def arena_games(row: Mapping[str, Any]) -> list[float]:
    """The model's outcomes in the two games of one question; none if a verdict is missing, as in the benchmark.

    The baseline is A in the first game, the model in the second.
    """
    games = row.get("games")
    if not isinstance(games, list | tuple) or len(games) < 2 or not all(isinstance(g, Mapping) for g in games[:2]):
        return []
    verdicts = [game.get("score") for game in games[:2]]
    if not all(isinstance(verdict, str) and verdict.strip() in VERDICTS for verdict in verdicts):
        return []
    as_b, as_a = (VERDICTS[verdict.strip()] for verdict in verdicts)
    return [*as_a, *(1 - outcome for outcome in as_b)]


def arena_scores(
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    styles: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    baseline: str | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Scores of the models of one category, in per cent, with the 5 % and 95 % points of a bootstrap of 100 rounds.

    Args:
        rows: judgements by model: uid (or question_id) and games.
        styles: for style control, by model and question: tokens, headers, lists, bold (`style_of`).
        baseline: the opponent, whose style is subtracted.

    Returns:
        by model: score, standard_error (clustered by question), lower, upper, n_total questions, n_failed; with styles
        also style_controlled, style_lower, style_upper.
    """
    rng = np.random.default_rng(seed)
    results: dict[str, dict[str, Any]] = {}
    battles: list[tuple[str, str, float]] = []
    for model, judged in rows.items():
        games = {_question(row): arena_games(row) for row in judged}
        failed = sum(not outcomes for outcomes in games.values())
        played = [(model, question, outcome) for question, outcomes in games.items() for outcome in outcomes]
        battles += played
        values = np.array([outcome for *_, outcome in played])
        mean, error = mean_and_se(values, [question for _, question, _ in played])
        rounds = [rng.choice(values, len(values)).mean() for _ in range(_ROUNDS)] if len(values) else [math.nan]
        warned = [f"{failed} of {len(games)} questions lack a verdict and are left out"] if failed else []
        results[model] = {
            "score": 100 * mean, "standard_error": 100 * error, "lower": 100 * float(np.quantile(rounds, 0.05)),
            "upper": 100 * float(np.quantile(rounds, 0.95)), "n_total": len(games) - failed, "n_failed": failed,
            "warnings": warned,
        }  # fmt: skip
    if styles is not None and baseline is not None:
        _add_style_control(results, battles, styles, baseline, rng)
    return results


def _question(row: Mapping[str, Any]) -> str:
    return str(row.get("uid", row.get("question_id")))


def _add_style_control(results: dict, battles: list, styles: Mapping, baseline: str, rng: np.random.Generator) -> None:
    base = styles.get(baseline, {})
    kept = [battle for battle in battles if battle[1] in styles.get(battle[0], {}) and battle[1] in base]
    without = {battle[:2] for battle in battles} - {battle[:2] for battle in kept}
    models = sorted({model for model, *_ in kept})
    for model in results:
        if model not in models:
            results[model]["warnings"].append(
                f"no style control: it and '{baseline}' have no answers to the same questions"
            )
    if not models:
        return
    difference = np.array([style_difference(styles[model][q], base[q]) for model, q, _ in kept])
    std = difference.std(axis=0, ddof=1) if len(kept) > 1 else np.zeros(difference.shape[1])
    # Equal differences have a standard deviation of rounding; divided by it they would be a second strength.
    varies = np.ptp(difference, axis=0) > 1e-12
    normal = np.where(varies, difference - difference.mean(axis=0), 0) / np.where(varies, std, 1)
    is_model = np.array([[float(model == column) for column in models] for model, *_ in kept])
    features, outcomes = np.hstack([is_model, normal]), np.array([outcome for *_, outcome in kept])
    counts = rng.multinomial(len(kept), np.full(len(kept), 1 / len(kept)), _ROUNDS)
    strengths = np.array([fit_logistic(features, outcomes, drawn)[: len(models)] for drawn in counts])
    for i, model in enumerate(models):
        points = 100 * np.quantile(expit(strengths[:, i]), [0.5, 0.05, 0.95])
        results[model] |= dict(zip(("style_controlled", "style_lower", "style_upper"), map(float, points), strict=True))
        if missing := sum(name == model for name, _ in without):
            results[model]["warnings"].append(f"{missing} questions without both answers are not in the style control")
        if len(models) == 1:
            # The benchmark centres the features over all games, here those of one model.
            results[model]["warnings"].append(
                "style control centres features over the games of all models: with one model alone it does little"
            )


def style_of(metadata: Mapping[str, Any]) -> list[float] | None:
    """Tokens, headers, list items and bold passages in an answer's `metadata`; None if one of them is missing."""
    style = []
    for name in ("token_len", "header_count", "list_count", "bold_count"):
        value = metadata.get(name)
        parts = list(value.values()) if isinstance(value, Mapping) else [value]
        numbers = [number_of(part) for part in parts]
        if not numbers or not all(map(math.isfinite, numbers)):
            return None
        style.append(sum(numbers))
    return style


def style_difference(model: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Relative difference in length, and the differences in headers, lists and bold passages per token.

    >>> style_difference([300, 3, 0, 0], [100, 0, 0, 0])
    [0.5, 0.009900990099009901, 0.0, 0.0]
    """
    total = model[0] + baseline[0]
    result = [(model[0] - baseline[0]) / total if total else 0.0]
    for ours, theirs in zip(model[1:], baseline[1:], strict=True):
        a, b = ours / model[0] if model[0] else 0.0, theirs / baseline[0] if baseline[0] else 0.0
        result.append((a - b) / (a + b + 1))
    return result
