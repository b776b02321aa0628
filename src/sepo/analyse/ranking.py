"""Rank selection rules by where they put their weight, before any policy is trained.

A gold reward says which words carry it. Each token of a response is then *right* (its word supports the side's label:
good words in chosen, bad words in rejected responses), *wrong* (its word contradicts the label) or neither. A good rule
gives weight to right tokens and none to wrong tokens. Measures of a selection, u = ± weight, 0 if not kept:

    auc            P(u of a right or wrong token's word is on its side of another word's u); ties count one half,
                   0.5 is chance (`evaluate.fidelity` compares rewards the same way)
    lift           number of right tokens kept, divided by the expected number in a random selection of each side
    mass           share of the gold reward of all right tokens that lies in kept tokens
    weight_right   share of the weight on right tokens; weight_wrong on wrong tokens
    cosine         cosine over all tokens between the signed weights, each as a share of its response's weight, and
                   the gold rewards of words. If the gradients of tokens are orthogonal, this is the gain of a small
                   step of fixed length, the root of the KL
    effective      (sum of w)^2 / sum of w^2 / tokens, mean over responses: the share of tokens that carry the weight

Several oracles give each measure a mean and an interval, and each rule a paired difference to the baseline, the first
rule. An oracle is a random draw, so a result for one oracle need not hold for the next. No function runs a model; the
cost is linear in the tokens, except for a sort.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from sepo.credit.selection import effective_number, select_key_tokens
from sepo.data.ragged import SIDES, SIGNED_SIDES, flat, segment_sums
from sepo.errors import UserError
from sepo.evaluate.fidelity import token_truth, weighted_auc
from sepo.evaluate.words import Truth
from sepo.report.statistics import interval, over_seeds

MEASURES = (
    "auc", "lift", "lift_chosen", "lift_rejected", "mass", "weight_right", "weight_wrong", "cosine", "effective",
)  # fmt: skip


class ScoredOracle(NamedTuple):
    """The inputs of a rule from one oracle.

    Attributes:
        scores: kind "scores".
        tokenizer: tokenizer of the score table.
        reference_logps: kind "logps", the same pairs under the reference; None if they are not stored.
    """

    scores: pa.Table
    tokenizer: PreTrainedTokenizerBase
    reference_logps: pa.Table | None = None


Rule = Callable[[ScoredOracle], pa.Table]  # returns a table of kind "selection"


def default_rules(k: float) -> dict[str, dict[str, Any]]:
    """The built-in rules, as settings of section `select` by name: the method itself first, controls last."""

    def both(rule: str, rate: float = k, **settings: Any) -> dict[str, Any]:
        return {"rule_chosen": rule, "rule_rejected": rule, "k_chosen": rate, "k_rejected": rate, **settings}

    return {
        f"top {k:g}": both("top"),
        "dataset": both("dataset"),
        "mass 0.8": both("mass", 0.8),
        "effective": both("effective"),
        "skip shared": both("top", skip_shared=True),
        "label_log_odds": both("top", label_log_odds=0.5),
        "label log-odds, skip shared": both("top", label_log_odds=0.5, skip_shared=True),
        "label log-odds, soft": both(
            "top", 1.0, label_log_odds=0.5, credit="soft", temperature=0.5, clip_low=-3.0, clip_high=3.0
        ),
        "labels alone": both("top", label_log_odds=1.0),
        "soft 0.3": both("top", 1.0, credit="soft", temperature=0.3, clip_low=-2.0, clip_high=2.0),
        "soft 1": both("top", 1.0, credit="soft"),
        "all": both("top", 1.0),
        "first": both("first"),
        "last": both("last"),
        "random": both("random"),
        "reversed": both("reversed"),
    }


def rules_of(settings: Mapping[str, Mapping[str, Any]], seed: int = 0) -> dict[str, Rule]:
    """Rules from settings of section `select`; `seed` is for random rules."""

    def rule(keywords: Mapping[str, Any]) -> Rule:
        return lambda oracle: select_key_tokens(oracle.scores, **{**keywords, "seed": seed})

    return {name: rule(keywords) for name, keywords in settings.items()}


def oracle_truth(oracle: ScoredOracle, truth: Truth) -> dict[str, np.ndarray]:
    """What each token is worth by side, `[tokens]` float64: 0 in words without value, NaN outside words."""
    return {side: token_truth(oracle.tokenizer, oracle.scores, side, truth) for side in SIDES}


def token_weights(selection: pa.Table, side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One side of a selection: weights `[tokens]` float64 (0 if not kept), kept `[tokens]` bool, and lengths.

    Raises:
        UserError: a weight is negative; shares of weights with both signs have no meaning.
    """
    _, lengths = flat(selection.column(f"{side}_ids"))
    positions, counts = flat(selection.column(f"{side}_positions"))
    given, _ = flat(selection.column(f"{side}_weights"))
    if (given < 0).any():
        raise UserError(f"a {side} token has {given.min():g} as weight: rules are ranked by weights of 0 or more")
    at = np.repeat(np.cumsum(lengths) - lengths, counts) + positions
    weights, kept = np.zeros(int(lengths.sum())), np.zeros(int(lengths.sum()), bool)
    weights[at], kept[at] = given, True
    return weights, kept, lengths


def measure_selection(selection: pa.Table, truth: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The `MEASURES` of one selection; NaN for a measure without data.

    Args:
        selection: kind "selection".
        truth: from `oracle_truth` for the same pairs.
    """
    cells: list[tuple[float, float]] = []
    kept_right = expected = mass = mass_kept = weight = right_weight = wrong_weight = 0.0
    inner, squares, gold_squares = 0.0, 0.0, 0.0
    effective: list[np.ndarray] = []
    lifts: dict[str, float] = {}
    for side, sign in SIGNED_SIDES:
        weights, kept, lengths = token_weights(selection, side)
        values = truth[side]
        right, wrong, neutral = sign * values > 0, sign * values < 0, values == 0  # all false outside words
        cells += _auc_cells(sign * weights, values > 0, values < 0, neutral)
        base = right.mean() if len(right) else 0.0
        hits = float((kept & right).sum())
        lifts[f"lift_{side}"] = _ratio(hits, base * kept.sum())
        kept_right, expected = kept_right + hits, expected + base * kept.sum()
        mass += float(np.abs(values[right]).sum())
        mass_kept += float(np.abs(values[right & kept]).sum())
        weight += float(weights.sum())
        right_weight += float(weights[right].sum())
        wrong_weight += float(weights[wrong].sum())
        shares = weights / np.repeat(np.maximum(segment_sums(weights, lengths), 1e-30), lengths)
        gold = np.nan_to_num(values)
        inner += float(sign * shares @ gold)
        squares, gold_squares = squares + float(shares @ shares), gold_squares + float(gold @ gold)
        effective.append(effective_number(weights, lengths) / np.maximum(lengths, 1))
    number = sum(count for _, count in cells)
    return {
        "auc": _ratio(sum(value * count for value, count in cells), number),
        "lift": _ratio(kept_right, expected),
        **lifts,
        "mass": _ratio(mass_kept, mass),
        "weight_right": _ratio(right_weight, weight),
        "weight_wrong": _ratio(wrong_weight, weight),
        "cosine": _ratio(inner, float(np.sqrt(squares * gold_squares))),
        "effective": float(np.concatenate(effective).mean()) if sum(map(len, effective)) else float("nan"),
    }


def rank_rules(oracles: Mapping[str, ScoredOracle], rules: Mapping[str, Rule], known: Truth) -> dict[str, Any]:
    """The `MEASURES` of every rule on every oracle, their means, and paired differences to the first rule.

    Args:
        oracles: by name; their pairs may differ.
        rules: by name, the baseline first.
        known: what each word is worth (`GoldReward.truth`); it may have one sign only.

    Returns:
        `oracles`, `baseline`, and `rules`: for each rule and measure `mean`, `low` and `high` (Student's t over
        oracles, 95 %), `values` (one per oracle), and the same of the `difference` to the baseline. NaN for a measure
        without data.

    Raises:
        UserError: there is no oracle or no rule, or no word of a response carries the gold reward.
    """
    if not oracles or not rules:
        raise UserError("there is nothing to rank: expected a score table and a rule, at least one of each")
    values: dict[str, list[dict[str, float]]] = {name: [] for name in rules}
    for name, oracle in oracles.items():
        truth = oracle_truth(oracle, known)
        if not any(np.nan_to_num(side).any() for side in truth.values()):
            raise UserError(f"no word in '{name}' carries the gold reward: rules cannot be ranked by it")
        for rule, select in rules.items():
            values[rule].append(measure_selection(select(oracle), truth))
    baseline = next(iter(rules))

    def summary(measure: str, rule: str) -> dict[str, Any]:
        by_oracle, of_baseline = ([measures[measure] for measures in values[name]] for name in (rule, baseline))
        return {
            **_over_oracles(by_oracle),
            "values": by_oracle,
            "difference": _over_oracles([a - b for a, b in zip(by_oracle, of_baseline, strict=True)]),
        }

    return {
        "oracles": list(oracles),
        "baseline": baseline,
        "rules": {rule: {measure: summary(measure, rule) for measure in MEASURES} for rule in rules},
    }


def _auc_cells(
    signed: np.ndarray, positive: np.ndarray, negative: np.ndarray, neutral: np.ndarray
) -> Iterable[tuple[float, float]]:
    """(AUC, number of tokens) of good words against neutral words, which should be lower, and of bad words, if any."""
    codes = np.unique(signed, return_inverse=True)[1]
    for targets, below in ((positive, False), (negative, True)):
        value = (
            weighted_auc(codes, targets.astype(np.float64), neutral.astype(np.float64)) if len(codes) else float("nan")
        )
        if not np.isnan(value):
            yield (1 - value if below else value), float(targets.sum())


def _over_oracles(values: Sequence[float]) -> dict[str, float]:
    """Mean of the defined values and its 95 % interval."""
    defined = [value for value in values if not np.isnan(value)]
    mean, error = over_seeds(defined)
    low, high = interval(mean, error, len(defined))
    return {"mean": mean, "low": low, "high": high}


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")
