"""Selection rules ranked by where they put their weight, before any policy is trained on it.

Where a gold reward says which words carry it, each token of a response is *right* (its word speaks for the side's
label: good words in chosen, bad ones in rejected responses), *wrong* (it speaks against it) or neither. A rule is as
good as the weight that it gives to right tokens and keeps from wrong ones. Of each selection:

    auc            P(u of a right or wrong token's word is on its side of another word's u), u = ± weight, 0 if not
                   kept; ties count one half; 0.5 is chance (as `evaluate.fidelity` compares rewards)
    lift           right tokens among those kept, over as many drawn at random of each side
    mass           share of the gold reward of all right tokens that lies in kept ones
    weight_right   share of the weight on right tokens; weight_wrong on wrong ones
    cosine         between the weights, ± and a share of their response's, and the words' gold rewards, over all tokens:
                   if tokens pull in directions of their own, the gain for a small step of given length, the root of
                   the KL
    effective      (sum of w)^2 / sum of w^2 / tokens, mean over responses: the share of tokens that the weight
                   spreads over

Several oracles give each figure a mean and an interval, and each rule a paired difference to the first: an oracle is a
draw, and what holds for one need not hold for the next. Nothing runs a model; all is linear in the tokens but for a
sort.
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
from sepo.evaluate.fidelity import weighted_auc
from sepo.evaluate.statistics import interval, over_seeds
from sepo.evaluate.words import word_valences

MEASURES = (
    "auc", "lift", "lift_chosen", "lift_rejected", "mass", "weight_right", "weight_wrong", "cosine", "effective",
)  # fmt: skip


class ScoredOracle(NamedTuple):
    """What a rule may read of one oracle.

    Attributes:
        scores: kind "scores".
        tokenizer: of its ids.
        reference_logps: kind "logps", of the same pairs under the reference; None where they are not stored.
    """

    scores: pa.Table
    tokenizer: PreTrainedTokenizerBase
    reference_logps: pa.Table | None = None


Rule = Callable[[ScoredOracle], pa.Table]  # to a table of kind "selection"


def default_rules(k: float) -> dict[str, dict[str, Any]]:
    """Settings of section `select` by name: what comes along, the method itself first, controls last."""

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
    """The rules that settings of section `select` describe; `seed` is that of random ones."""

    def rule(keywords: Mapping[str, Any]) -> Rule:
        return lambda oracle: select_key_tokens(oracle.scores, **{**keywords, "seed": seed})

    return {name: rule(keywords) for name, keywords in settings.items()}


def token_truth(oracle: ScoredOracle, valence: Callable[[str], float]) -> dict[str, np.ndarray]:
    """The gold reward of each token's word, of each side `[tokens]` float64: 0 in other words, NaN outside words."""
    return {
        side: np.concatenate(
            [
                np.zeros(0),
                *(
                    word_valences(oracle.tokenizer, ids, valence)
                    for ids in oracle.scores.column(f"{side}_ids").to_pylist()
                ),
            ]
        )
        for side in SIDES
    }


def token_weights(selection: pa.Table, side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one side of a selection: weights `[tokens]` float64, 0 where not kept; which are kept, bool; lengths.

    Raises:
        UserError: a weight is negative; the share of a weight that pulls both ways says nothing.
    """
    _, lengths = flat(selection.column(f"{side}_ids"))
    positions, counts = flat(selection.column(f"{side}_positions"))
    given, _ = flat(selection.column(f"{side}_weights"))
    if (given < 0).any():
        raise UserError(f"rules are ranked by weights of at least 0, and a {side} token has {given.min():g}")
    at = np.repeat(np.cumsum(lengths) - lengths, counts) + positions
    weights, kept = np.zeros(int(lengths.sum())), np.zeros(int(lengths.sum()), bool)
    weights[at], kept[at] = given, True
    return weights, kept, lengths


def measure_selection(selection: pa.Table, truth: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The `MEASURES` of one selection; one to which nothing contributes is NaN.

    Args:
        selection: kind "selection".
        truth: from `token_truth`, of the same pairs.
    """
    cells: list[tuple[float, float]] = []
    kept_right = expected = mass = mass_kept = weight = right_weight = wrong_weight = 0.0
    inner, squares, gold_squares = 0.0, 0.0, 0.0
    spread: list[np.ndarray] = []
    found: dict[str, float] = {}
    for side, sign in SIGNED_SIDES:
        weights, kept, lengths = token_weights(selection, side)
        values = truth[side]
        right, wrong, other = sign * values > 0, sign * values < 0, values == 0  # all false outside words
        cells += _auc_cells(sign * weights, values > 0, values < 0, other)
        base = right.mean() if len(right) else 0.0
        hits = float((kept & right).sum())
        found[f"lift_{side}"] = _ratio(hits, base * kept.sum())
        kept_right, expected = kept_right + hits, expected + base * kept.sum()
        mass += float(np.abs(values[right]).sum())
        mass_kept += float(np.abs(values[right & kept]).sum())
        weight += float(weights.sum())
        right_weight, wrong_weight = (
            right_weight + float(weights[right].sum()),
            wrong_weight + float(weights[wrong].sum()),
        )
        shares = weights / np.repeat(np.maximum(segment_sums(weights, lengths), 1e-30), lengths)
        gold = np.nan_to_num(values)
        inner += float(sign * shares @ gold)
        squares, gold_squares = squares + float(shares @ shares), gold_squares + float(gold @ gold)
        spread.append(effective_number(weights, lengths) / np.maximum(lengths, 1))
    number = sum(count for _, count in cells)
    return {
        "auc": _ratio(sum(value * count for value, count in cells), number),
        "lift": _ratio(kept_right, expected),
        **found,
        "mass": _ratio(mass_kept, mass),
        "weight_right": _ratio(right_weight, weight),
        "weight_wrong": _ratio(wrong_weight, weight),
        "cosine": _ratio(inner, float(np.sqrt(squares * gold_squares))),
        "effective": float(np.concatenate(spread).mean()) if sum(map(len, spread)) else float("nan"),
    }


def rank_rules(
    oracles: Mapping[str, ScoredOracle], rules: Mapping[str, Rule], valence: Callable[[str], float]
) -> dict[str, Any]:
    """Every rule on every oracle: the `MEASURES`, their means, and differences to the first rule, oracle by oracle.

    Args:
        oracles: by name, of the same pairs or others.
        rules: by name, the one to compare with first.
        valence: a word's gold reward, 0 for a word that carries none; it may have one sign only.

    Returns:
        `oracles`, `baseline`, and `rules`: for each rule and measure `mean`, `low` and `high` (Student's t over
        oracles, 95 %), `values` (one an oracle), and the same of the `difference` to the baseline. A figure that
        nothing contributes to is NaN.

    Raises:
        UserError: there is no oracle, or no word of any response carries the gold reward.
    """
    if not oracles or not rules:
        raise UserError("there is nothing to rank: expected a score table and a rule, at least one of each")
    values: dict[str, list[dict[str, float]]] = {name: [] for name in rules}
    for name, oracle in oracles.items():
        truth = token_truth(oracle, valence)
        if not any(np.nan_to_num(side).any() for side in truth.values()):
            raise UserError(f"no word in '{name}' carries the gold reward: rules cannot be ranked by it")
        for rule, select in rules.items():
            values[rule].append(measure_selection(select(oracle), truth))
    baseline = next(iter(rules))

    def summary(measure: str, rule: str) -> dict[str, Any]:
        own, other = ([one[measure] for one in values[name]] for name in (rule, baseline))
        return {
            **_over_oracles(own),
            "values": own,
            "difference": _over_oracles([a - b for a, b in zip(own, other, strict=True)]),
        }

    return {
        "oracles": list(oracles),
        "baseline": baseline,
        "rules": {rule: {measure: summary(measure, rule) for measure in MEASURES} for rule in rules},
    }


def _auc_cells(
    signed: np.ndarray, positive: np.ndarray, negative: np.ndarray, other: np.ndarray
) -> Iterable[tuple[float, float]]:
    """(AUC, number of target tokens) of good words, which should lie above others, and of bad ones, below; if any."""
    codes = np.unique(signed, return_inverse=True)[1]
    for targets, below in ((positive, False), (negative, True)):
        value = (
            weighted_auc(codes, targets.astype(np.float64), other.astype(np.float64)) if len(codes) else float("nan")
        )
        if not np.isnan(value):
            yield (1 - value if below else value), float(targets.sum())


def _over_oracles(values: Sequence[float]) -> dict[str, float]:
    """Mean of the defined values and its interval of 95 %."""
    defined = [value for value in values if not np.isnan(value)]
    mean, error = over_seeds(defined)
    low, high = interval(mean, error, len(defined))
    return {"mean": mean, "low": low, "high": high}


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")
