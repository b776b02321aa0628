"""Key tokens: the tokens of a response that the policy is trained on, and the weight of each.

The paper's rule, "top" (arXiv 2408.13518, section 3.3): of a chosen response of n tokens keep the floor(k n) tokens
with the highest reward, of a rejected one the floor(k n) with the lowest, at least one each, ties to the earlier token.
Here the token that ends a response is left out unless asked for (see `select_key_tokens`).

Every rule is an order of the tokens and a number of tokens to keep of each response, so one sort of all tokens serves
them all. With v = s on the chosen side and v = -s on the rejected side (how much a token speaks for its label):

    rule        order            number
    top         v, highest       floor(k n)
    reversed    v, lowest        floor(k n): the adversarial control
    random      a hash           floor(k n): the control
    first last  position         floor(k n)
    shorter     position         the first min(n_w, n_l): both responses cut to the shorter one's length (POET)
    threshold   v, highest       tokens with s >= t (chosen), s <= t (rejected)
    dataset     v, highest       as threshold, with t such that a share k of all the dataset's tokens is kept
    mass        v, highest       fewest tokens that hold a share k of the response's sum of max(v, 0)
    effective   v, highest       (sum of max(v, 0))^2 / sum of max(v, 0)^2, rounded up: the response's own rate

Of "threshold" on they adapt the rate to the rewards; at least one token is always kept. "shorter" with `include_end`,
every token of what remains, is POET (arXiv 2506.09457); k is not read.

Pairs count alike, unless `confidence` weighs them (`pair_confidence`).

With `evidence`, v is no longer the reward alone (`evidence.py`); with `skip_shared`, tokens whose id both responses of
the pair hold are not kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from sepo.credit.label_log_odds import LabelStatistics, label_statistics, with_label_log_odds
from sepo.data.ragged import SIDES, SIGNED_SIDES, flat, ragged, segment_sums
from sepo.data.tables import PAIR_WEIGHT, make_table, provenance_of, require_table
from sepo.errors import UserError, check_number, nearest, one_line
from sepo.recipe.settings import Rule

RULES: tuple[str, ...] = get_args(Rule)


def keep_counts(lengths: np.ndarray, rate: float) -> np.ndarray:
    """Number of tokens to keep of responses of `lengths` tokens: floor(rate * n), at least 1.

    The floor forgives a product that misses a whole number by rounding (0.29 * 100 is 28.999...).

    >>> keep_counts(np.array([1, 3, 10, 100]), 0.29)
    array([ 1,  1,  2, 29])
    """
    return np.maximum(1, np.floor(rate * lengths + 1e-9).astype(np.int64))


def extreme_positions(
    rewards: np.ndarray, lengths: np.ndarray, counts: np.ndarray, highest: bool, eligible: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the `counts[i]` highest (or lowest) rewards in each response, ascending within a response.

    Args:
        rewards: `[sum(lengths)]`, all responses one after the other.
        lengths: `[n]` tokens in each response.
        counts: `[n]` tokens to keep of each, at most its length.
        highest: keep the highest rewards, else the lowest; ties go to the earlier token.
        eligible: `[sum(lengths)]` bool, the tokens that may be kept; a response with none keeps its best token anyway.

    Returns:
        positions `[sum(kept)]` int64, counted from the start of the own response, and `kept` `[n]`, their number:
        `counts` unless fewer tokens are eligible.
    """
    response = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    position = np.arange(len(rewards)) - starts
    barred = np.zeros(len(rewards), bool) if eligible is None else ~eligible
    order = np.lexsort((position, -rewards if highest else rewards, barred, response))
    rank = np.arange(len(rewards)) - starts  # of the sorted tokens: responses stay in place
    allowed = np.bincount(response[~barred], minlength=len(lengths))
    kept_counts = np.minimum(counts, np.maximum(1, allowed))
    kept = order[rank < kept_counts[response]]
    return position[np.sort(kept)], kept_counts


def ends_response(ids: np.ndarray, lengths: np.ndarray, end_ids: Sequence[int]) -> np.ndarray:
    """Mark the token that ends each response, if it is an end of turn or text: `[sum(lengths)]` bool."""
    marks = np.zeros(len(ids), bool)
    last = np.cumsum(lengths)[lengths > 0] - 1
    marks[last] = np.isin(ids[last], np.asarray(end_ids, dtype=ids.dtype))
    return marks


def shared_tokens(scores: pa.Table) -> dict[str, np.ndarray]:
    """Mark, of each side, the tokens whose id stands in the other response of their pair too: `[tokens]` bool.

    A contrast of the two responses can say nothing about what both have, and a rule that takes the best of one side and
    the worst of the other keeps many of them on one side alone.
    """
    keys = {}
    for side in SIDES:
        ids, lengths = flat(scores.column(f"{side}_ids"))
        keys[side] = (
            np.repeat(np.arange(len(lengths)), lengths) * 2**32 + ids
        )  # ids are int32: no two pairs share a key
    chosen, rejected = keys.values()
    return {"chosen": np.isin(chosen, rejected), "rejected": np.isin(rejected, chosen)}


def select_key_tokens(
    scores: pa.Table,
    k_chosen: float = 0.3,
    k_rejected: float = 0.3,
    include_end: bool = False,
    *,
    rule_chosen: str = "top",
    rule_rejected: str = "top",
    threshold_chosen: float = 0.0,
    threshold_rejected: float = 0.0,
    credit: str = "hard",
    temperature: float = 1.0,
    clip_low: float = -0.5,
    clip_high: float = 1.5,
    normalise: bool = True,
    skip_shared: bool = False,
    label_log_odds: float = 0.0,
    statistics: LabelStatistics | None = None,
    confidence: float = 0.0,
    seed: int = 0,
) -> pa.Table:
    """Apply a rule to a table of kind "scores"; returns a table of kind "selection", row for row.

    Args:
        scores: with the provenance that `tokenize_pairs` gives (its `end_ids` name the end-of-response tokens).
        k_chosen, k_rejected: share of a response's tokens to keep; of its reward mass for rule "mass"; of all tokens of
            the side for rule "dataset". Rules "threshold" and "effective" do not read it.
        include_end: let the end-of-response token compete, as in the paper. An oracle may reward ending on both
            sides alike; taking the highest of one side and the lowest of the other then keeps the end in chosen
            responses only, an asymmetry that says nothing about the preference (results/README.md).
        rule_chosen, rule_rejected: one of `RULES`, see the module's text.
        threshold_chosen, threshold_rejected: of rule "threshold".
        credit: "hard" gives every kept token weight 1, "soft" the weight exp(±clip(s / temperature, clip_low,
            clip_high)), plus on the chosen side and minus on the rejected; "reward" the reward itself: weights that
            were imported, and what tgdpo and wspo read. With temperature 1, the default clip, k 1
            and `normalise` off these are TIS-DPO's weights (arXiv 2410.04350, equation 12).
        normalise: scale soft weights to a mean of 1 over the kept tokens of each response.
        skip_shared: leave out tokens that both responses of the pair hold (`shared_tokens`).
        label_log_odds: share of what the labels say of a token's id in v, 0 to 1 (`evidence.with_evidence`).
        statistics: those that `evidence` reads, of the whole dataset where `scores` is a part of it.
        confidence: scale of the margin in `pair_confidence`, whose weights of pairs the table then has; 0: none.
        seed: of rule "random"; the draw of a token depends on seed, side, pair id and position alone.

    Raises:
        UserError: a rate lies outside (0, 1], or a rule, a credit or its settings are not known or impossible.
    """
    settings: dict[str, Any] = {
        "rule_chosen": rule_chosen,
        "rule_rejected": rule_rejected,
        "threshold_chosen": threshold_chosen,
        "threshold_rejected": threshold_rejected,
        "credit": credit,
        "temperature": temperature,
        "clip_low": clip_low,
        "clip_high": clip_high,
        "normalise": normalise,
        "seed": seed,
        # Named only where they are used: tables from before there were these stay what they are.
        **({"skip_shared": True} if skip_shared else {}),
        **({"label_log_odds": label_log_odds} if label_log_odds else {}),
        **({"confidence": confidence} if confidence else {}),
    }
    require_table("scores", scores, "scores")
    check_rule(k_chosen, k_rejected, **settings)
    if label_log_odds and statistics is None:
        statistics = label_statistics([scores])
    thresholds = dataset_thresholds(
        [scores], k_chosen, k_rejected, include_end=include_end, statistics=statistics, **settings
    )
    rates = {"chosen": k_chosen, "rejected": k_rejected}
    provenance = {key: value for key, value in provenance_of(scores).items() if key not in ("format", "version")}
    columns: dict[str, object] = {name: scores.column(name) for name in scores.column_names}
    pair_ids = scores.column("pair_id").to_numpy()
    for side, sign in SIGNED_SIDES:
        rewards, lengths, eligible = _side(scores, side, include_end, skip_shared, label_log_odds, statistics)
        values = sign * rewards
        rule = thresholds[f"rule_{side}"]
        position = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        if rule == "random":
            order = _uniform(seed, side, np.repeat(pair_ids, lengths), position)
        elif rule in ("first", "last", "shorter"):
            order = position if rule == "last" else -position
        else:
            order = -values if rule == "reversed" else values
        if rule == "threshold":
            kept = eligible & (values >= sign * thresholds[f"threshold_{side}"])
            counts = np.maximum(1, segment_sums(kept, lengths)).astype(np.int64)
        elif rule in ("mass", "effective"):
            counts = _adaptive_counts(rule, np.where(eligible, values, 0), lengths, rates[side])
        elif rule == "shorter":
            counts = np.minimum(*(flat(scores.column(f"{one}_rewards"))[1] for one in SIDES))
        else:
            counts = keep_counts(lengths, rates[side])
        positions, counts = extreme_positions(order, lengths, counts, highest=True, eligible=eligible)
        weights = np.ones(len(positions), np.float32)
        if credit == "soft":
            starts = np.repeat(np.cumsum(lengths) - lengths, counts)
            scaled = rewards[starts + positions].astype(np.float64) / temperature
            weights = soft_weights(sign * np.clip(scaled, clip_low, clip_high), counts, normalise)
        elif credit == "reward":
            starts = np.repeat(np.cumsum(lengths) - lengths, counts)
            weights = rewards[starts + positions].astype(np.float32)
        columns[f"{side}_positions"] = ragged(positions.astype(np.int32), counts)
        columns[f"{side}_weights"] = ragged(weights, counts)
    if confidence:
        columns[PAIR_WEIGHT] = pair_confidence(scores, confidence)
    chosen_settings = {"k_chosen": k_chosen, "k_rejected": k_rejected, "include_end": include_end, **settings}
    return make_table("selection", columns, {**provenance, **chosen_settings})


def pair_confidence(scores: pa.Table, scale: float) -> np.ndarray:
    """How sure the oracle is of each pair's label, as a weight of its loss: `[rows]` float32 from 0 to 1.

        C = max(0, 2 sigmoid(scale (sum of s over y_w - sum of s over y_l)) - 1)

    CW-PO (arXiv 2603.04968) has the weak annotator's scores in place of scale times these sums, which an oracle's DPO
    makes its own reward where `scale` is its beta. There the annotator also says which response is the better one, so
    that no weight is below 0; here the data say it, and a pair on which the oracle says otherwise gets none.
    """
    chosen, rejected = (segment_sums(*flat(scores.column(f"{side}_rewards"))) for side in SIDES)
    return np.maximum(0, np.tanh(scale / 2 * (chosen - rejected))).astype(np.float32)


def soft_weights(logits: np.ndarray, counts: np.ndarray, normalise: bool = True) -> np.ndarray:
    """Weights exp(logit) of the kept tokens, scaled to a mean of 1 in each response if asked: `[sum(counts)]` float32.

    >>> soft_weights(np.log([1.0, 3.0, 5.0]), np.array([2, 1])).tolist()
    [0.5, 1.5, 1.0]
    """
    weights = np.exp(logits)
    if normalise:
        means = segment_sums(weights, counts) / np.maximum(counts, 1)
        weights = weights / np.repeat(means, counts)
    return weights.astype(np.float32)


def dataset_thresholds(
    tables: Iterable[pa.Table],
    k_chosen: float,
    k_rejected: float,
    *,
    include_end: bool = False,
    statistics: LabelStatistics | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Turn rule "dataset" into "threshold", with the threshold that keeps a share k of all tokens of a side.

    Args:
        tables: the shards of a score table; read only if a side has that rule.
        statistics: needed where the settings have `evidence`.
        settings: keywords of `select_key_tokens`.

    Returns:
        `settings` and `include_end`, as keywords of `select_key_tokens`.
    """
    settings = {"include_end": include_end, **settings}
    wanted = [(side, sign) for side, sign in SIGNED_SIDES if settings.get(f"rule_{side}") == "dataset"]
    if not wanted:
        return settings
    values_read = settings.get("skip_shared", False), settings.get("label_log_odds", 0.0)
    found: dict[str, list[np.ndarray]] = {side: [] for side, _ in wanted}
    for table in tables:
        for side, sign in wanted:
            rewards, _, eligible = _side(table, side, include_end, *values_read, statistics)
            found[side].append(sign * rewards[eligible])
    for side, sign in wanted:
        values = np.concatenate(found[side])
        number = max(1, int(np.floor((k_chosen if side == "chosen" else k_rejected) * len(values) + 1e-9)))
        threshold = -np.partition(-values, number - 1)[number - 1] if len(values) else 0.0
        settings |= {f"rule_{side}": "threshold", f"threshold_{side}": float(sign * threshold)}
    return settings


def _side(
    scores: pa.Table,
    side: str,
    include_end: bool,
    skip_shared: bool,
    label_log_odds: float,
    statistics: LabelStatistics | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat rewards `[tokens]`, lengths `[rows]` and the tokens that may be kept `[tokens]` bool, of one side."""
    rewards, lengths = flat(scores.column(f"{side}_rewards"))
    ids, _ = flat(scores.column(f"{side}_ids"))
    eligible = np.ones(len(rewards), bool)
    if not include_end:
        eligible &= ~ends_response(ids, lengths, provenance_of(scores).get("end_ids", []))
    if skip_shared:
        eligible &= ~shared_tokens(scores)[side]
    if label_log_odds:
        assert statistics is not None
        rewards = with_label_log_odds(rewards, ids, side, statistics, label_log_odds)
    return rewards, lengths, eligible


def _adaptive_counts(rule: str, values: np.ndarray, lengths: np.ndarray, share: float) -> np.ndarray:
    """Tokens to keep of each response by its own reward mass, max(v, 0), at least 1: `[rows]`."""
    mass = np.maximum(values.astype(np.float64), 0)
    totals = segment_sums(mass, lengths)
    if rule == "effective":
        return np.ceil(effective_number(mass, lengths) - 1e-9).astype(np.int64)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    ordered = mass[np.lexsort((-mass, rows))]
    running = np.concatenate([[0.0], np.cumsum(ordered)])
    before = running[:-1] - np.repeat(running[np.cumsum(lengths) - lengths], lengths)
    needed = (ordered > 0) & (before < np.repeat(share * totals, lengths) * (1 - 1e-9))
    return np.maximum(1, segment_sums(needed, lengths)).astype(np.int64)


def effective_number(mass: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(sum of mass)^2 / sum of mass^2 of each response, the number of equal tokens that would spread as far: `[rows]`.

    1 for a response without mass.
    """
    totals, squares = segment_sums(mass, lengths), segment_sums(mass**2, lengths)
    return np.divide(totals**2, squares, out=np.ones_like(totals), where=squares > 0)


def _uniform(seed: int, side: str, pair_ids: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) that depend on their arguments alone (SplitMix64), whatever the table's order or shards."""
    with np.errstate(over="ignore"):
        mixed = _mix(np.array([2 * seed + (side == "rejected")], np.uint64))
        mixed = _mix(mixed ^ pair_ids.astype(np.uint64))
        mixed = _mix(mixed ^ position.astype(np.uint64))
    return (mixed >> np.uint64(11)) * 2.0**-53


def _mix(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def check_rule(k_chosen: float, k_rejected: float, **settings: Any) -> None:
    """Raise a UserError for settings that `select_key_tokens` cannot use."""
    for side, rate in (("chosen", k_chosen), ("rejected", k_rejected)):
        check_rate(f"k_{side}", rate)
        rule = settings.get(f"rule_{side}", "top")
        if rule not in RULES:
            raise UserError(f"rule_{side} is '{rule}'{nearest(str(rule), RULES)}: expected one of {', '.join(RULES)}")
    credit, label_log_odds = settings.get("credit", "hard"), settings.get("label_log_odds", 0.0)
    if credit not in ("hard", "soft", "reward"):
        raise UserError(f"credit is '{credit}': expected hard, soft or reward")
    check_number("label_log_odds", label_log_odds, least=0, most=1)
    check_number("confidence", settings.get("confidence", 0.0), least=0)
    if credit == "reward" and label_log_odds:
        raise UserError("credit 'reward' is the reward as it is: leave label_log_odds at 0, or take another credit")
    check_number("temperature", settings.get("temperature", 1.0), above=0)
    for name in ("clip_low", "clip_high", "threshold_chosen", "threshold_rejected"):
        check_number(name, settings.get(name, 0.0))
    check_number("seed", settings.get("seed", 0), whole=True, least=0)
    if not settings.get("clip_low", -0.5) <= settings.get("clip_high", 1.5):
        raise UserError(f"clip_low {settings['clip_low']} is above clip_high {settings['clip_high']}")


def check_rate(name: str, rate: float) -> None:
    """Raise a UserError unless 0 < rate <= 1."""
    if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 < rate <= 1:
        shown = one_line(repr(rate), 60)
        raise UserError(
            f"{name} is {shown}: the share of tokens to keep must be above 0 and at most 1, for example 0.3"
        )


def selection_order(rewards: np.ndarray, side: str, ended: bool = False) -> np.ndarray:
    """Positions of one response in the order in which they are selected.

    Args:
        rewards: token rewards s_i `[tokens]`.
        side: "chosen" (highest first) or "rejected" (lowest first); ties go to the earlier position.
        ended: the last token ends the response and is no candidate: it comes last.

    >>> selection_order(np.array([0.1, 0.5, 0.5, -0.2]), "chosen").tolist()
    [1, 2, 0, 3]
    >>> selection_order(np.array([0.1, 0.5, 0.5, -0.2]), "rejected", ended=True).tolist()
    [0, 1, 2, 3]
    """
    last = np.arange(len(rewards)) == (len(rewards) - 1 if ended else -1)
    return np.lexsort((-rewards if side == "chosen" else rewards, last))
