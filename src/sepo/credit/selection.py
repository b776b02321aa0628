"""Key tokens: the tokens of a response that the policy is trained on, and the weight of each.

The paper's rule, "top" (arXiv 2408.13518, section 3.3), keeps floor(k n) of the n tokens of a response, at least one:
those with the highest reward of a chosen response, those with the lowest of a rejected one. Ties go to the earlier
token. Unlike in the paper, the token that ends a response is no candidate by default (see `select_key_tokens`).

Every rule is an order of the tokens and a number of tokens to keep of each response, so one sort of all tokens serves
all rules. With v = s on the chosen side and v = -s on the rejected side (how much a token speaks for its label):

    rule        order            number
    top         v, highest       floor(k n)
    reversed    v, lowest        floor(k n): the adversarial control
    random      a hash           floor(k n): the control
    first last  position         floor(k n)
    shorter     position         the first min(n_w, n_l): both responses cut to the shorter one's length (POET)
    threshold   v, highest       tokens with s >= t (chosen), s <= t (rejected)
    dataset     v, highest       as threshold; t keeps a share k of all tokens of the dataset
    mass        v, highest       fewest tokens that hold a share k of the response's sum of max(v, 0)
    effective   v, highest       (sum of max(v, 0))^2 / sum of max(v, 0)^2, rounded up: the response's own rate

The last four adapt the number to the rewards, but keep at least one token. "shorter" ignores k; with `include_end` and
all remaining tokens kept it is POET (arXiv 2506.09457).

All pairs have the same weight unless `confidence` is set (`pair_confidence`). With `label_log_odds`, v mixes the reward
with label statistics (`label_log_odds.py`). With `skip_shared`, tokens whose id occurs in both responses of a pair are
no candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from sepo.data.ragged import SIDES, SIGNED_SIDES, flat, ragged, segment_sums
from sepo.data.tables import PAIR_WEIGHT, make_table, provenance_of, require_both_sides, require_table
from sepo.errors import UserError, check_number, nearest, one_line
from sepo.recipe.reading import explain
from sepo.recipe.settings import Rule, SelectSettings

if TYPE_CHECKING:
    from sepo.credit.label_log_odds import LabelStatistics

RULES: tuple[str, ...] = get_args(Rule)
TRUTH_REST = 0.05  # weight of the tokens that the truth does not count for their side


def keep_counts(lengths: np.ndarray, rate: float) -> np.ndarray:
    """Number of tokens to keep of responses of `lengths` tokens: floor(rate * n), at least 1.

    The floor tolerates a product that rounding leaves just below a whole number (0.29 * 100 is 28.999...).

    >>> keep_counts(np.array([1, 3, 10, 100]), 0.29)
    array([ 1,  1,  2, 29])
    """
    return np.maximum(1, np.floor(rate * lengths + 1e-9).astype(np.int64))


def extreme_positions(
    rewards: np.ndarray, lengths: np.ndarray, counts: np.ndarray, eligible: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the `counts[i]` highest rewards in each response, ascending within a response.

    Args:
        rewards: `[sum(lengths)]`, all responses one after the other.
        lengths: `[n]` tokens in each response.
        counts: `[n]` tokens to keep of each, at most its length; ties go to the earlier token.
        eligible: `[sum(lengths)]` bool, the tokens that may be kept; a response without any keeps its best token.

    Returns:
        positions `[sum(kept)]` int64, counted from the start of their response, and `kept` `[n]`, the number of
        positions: `counts`, unless fewer tokens are eligible.
    """
    response = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    position = np.arange(len(rewards)) - starts
    excluded = np.zeros(len(rewards), bool) if eligible is None else ~eligible
    order = np.lexsort((position, -rewards, excluded, response))
    rank = position  # of the sorted tokens: sorting leaves responses in place
    allowed = np.bincount(response[~excluded], minlength=len(lengths))
    kept_counts = np.minimum(counts, np.maximum(1, allowed))
    kept = order[rank < kept_counts[response]]
    return position[np.sort(kept)], kept_counts


def ends_response(ids: np.ndarray, lengths: np.ndarray, end_ids: Sequence[int]) -> np.ndarray:
    """Mark the last token of each response if it is an end of turn or of text: `[sum(lengths)]` bool."""
    marks = np.zeros(len(ids), bool)
    last = np.cumsum(lengths)[lengths > 0] - 1
    marks[last] = np.isin(ids[last], np.asarray(end_ids, dtype=ids.dtype))
    return marks


def turn_ends(table: pa.Table, side: str) -> np.ndarray:
    """Mark the tokens of a side that end an assistant turn: `[tokens]` bool.

    These are the last tokens of the responses, and of their earlier turns, that the table's provenance calls ends.
    """
    ids, lengths = flat(table.column(f"{side}_ids"))
    end_ids = provenance_of(table).get("end_ids", [])
    marks = ends_response(ids, lengths, end_ids)
    if f"{side}_context_at" in table.column_names:
        at, counts = flat(table.column(f"{side}_context_at"))
        before = np.repeat(np.cumsum(lengths) - lengths, counts)[at > 0] + at[at > 0] - 1
        marks[before] = np.isin(ids[before], np.asarray(end_ids, dtype=ids.dtype))
    return marks


def shared_tokens(scores: pa.Table) -> dict[str, np.ndarray]:
    """Mark the tokens of each side whose id also occurs in the other response of their pair: `[tokens]` bool.

    A contrast of the two responses says nothing about tokens that both have. A rule that takes the best of one side and
    the worst of the other keeps many of these tokens on one side only.
    """
    keys = {}
    for side in SIDES:
        ids, lengths = flat(scores.column(f"{side}_ids"))
        keys[side] = np.repeat(np.arange(len(lengths)), lengths) * 2**32 + ids  # ids are int32: keys differ by pair
    chosen, rejected = keys.values()
    return {"chosen": np.isin(chosen, rejected), "rejected": np.isin(rejected, chosen)}


def select_key_tokens(
    scores: pa.Table,
    k_chosen: float = 0.3,
    k_rejected: float = 0.3,
    include_end: bool = False,
    *,
    settings: SelectSettings | None = None,
    statistics: LabelStatistics | None = None,
    seed: int = 0,
    **keywords: Any,
) -> pa.Table:
    """Select the key tokens of a table of kind "scores".

    Args:
        scores: with the provenance from `tokenize_pairs`; its `end_ids` name the end-of-response tokens.
        k_chosen, k_rejected: share of a response's tokens to keep. For rule "mass" a share of the response's reward
            mass, for rule "dataset" of all tokens of the side. Rules "threshold", "effective" and "shorter" ignore it.
        include_end: let the end-of-response token compete, as in the paper. An oracle may reward ending on both
            sides alike. Taking the highest of one side and the lowest of the other then keeps the end in chosen
            responses only, an asymmetry that says nothing about the preference (results/README.md).
        settings: all settings in one object, in place of the rates, `include_end` and the keywords.
        statistics: label statistics of the whole dataset, for `label_log_odds`; default: those of `scores`.
        seed: seed of rule "random". The draw of a token depends on seed, side, pair id and position alone.
        keywords: further fields of `SelectSettings`:

            rule_chosen, rule_rejected: one of `RULES`, see the module's text.
            threshold_chosen, threshold_rejected: t of rule "threshold".
            credit: weight of a key token. "hard": 1. "soft": exp(±clip(s / temperature, clip_low, clip_high)), plus
            on the chosen side and minus on the rejected. "reward": the reward itself, for imported weights and
            for tgdpo and wspo. "truth": 1 where a reward, the truth of a gold reward, supports the side, else 0.05.
            Soft weights with temperature 1, the default clip, k 1 and `normalise` off are those
            of TIS-DPO (arXiv 2410.04350, equation 12).
            normalise: scale soft weights to a mean of 1 over the key tokens of each response.
            skip_shared: leave out tokens that both responses of the pair hold (`shared_tokens`).
            label_log_odds: share of label statistics in v, 0 to 1 (`label_log_odds.with_label_log_odds`).
            confidence: scale of the margin in `pair_confidence`; 0: no weights of pairs.

    Returns:
        a table of kind "selection", row for row with `scores`.

    Raises:
        UserError: a rate lies outside (0, 1], or a setting is unknown or impossible.
    """
    require_both_sides(require_table("scores", scores, "scores"), "the score table")
    settings = _settings_of(settings, k_chosen=k_chosen, k_rejected=k_rejected, include_end=include_end, **keywords)
    check_number("seed", seed, whole=True, least=0)
    if settings.label_log_odds and statistics is None:
        from sepo.credit.label_log_odds import label_statistics

        statistics = label_statistics([scores])
    columns = {name: scores.column(name) for name in scores.column_names}
    columns |= _selection_columns(scores, settings, statistics, seed)
    # Settings that came later are recorded only where they are used, so that older tables keep their digests.
    used = {name: value for name, value in settings.model_dump().items() if value or name not in _LATER}
    return make_table("selection", columns, {**provenance_of(scores), **used, "seed": seed})


def _selection_columns(
    scores: pa.Table, settings: SelectSettings, statistics: LabelStatistics | None, seed: int
) -> dict[str, Any]:
    """Positions and weights of the key tokens of both sides, and the weights of the pairs where they have any."""
    rules = dataset_thresholds([scores], settings, statistics)
    columns: dict[str, Any] = {}
    for side, sign in SIGNED_SIDES:
        tokens = _tokens_of(scores, side, settings, statistics)
        positions, counts = _key_positions(tokens, scores, side, sign, rules, seed)
        weights = _weights(tokens.rewards[tokens.starts(counts) + positions], counts, sign, settings)
        columns[f"{side}_positions"] = ragged(positions.astype(np.int32), counts)
        columns[f"{side}_weights"] = ragged(weights, counts)
    if settings.confidence:
        columns[PAIR_WEIGHT] = pair_confidence(scores, settings.confidence)
    return columns


def _settings_of(settings: SelectSettings | None, **given: Any) -> SelectSettings:
    """The settings, or those of keywords, checked."""
    if settings is None:
        settings = select_settings(**given)
    elif given != {"k_chosen": 0.3, "k_rejected": 0.3, "include_end": False}:
        raise UserError("select_key_tokens got settings and keywords: expected one of them")
    check_rule(settings)
    return settings


_LATER = ("skip_shared", "label_log_odds", "confidence")


def select_settings(**keywords: Any) -> SelectSettings:
    """Settings of a selection from keywords.

    Raises:
        UserError: names the keyword that is unknown or has an impossible value.
    """
    for side in SIDES:
        check_rate(f"k_{side}", keywords.get(f"k_{side}", 0.3))
        if (rule := keywords.get(f"rule_{side}", "top")) not in RULES:
            raise UserError(f"rule_{side} is '{rule}'{nearest(str(rule), RULES)}: expected one of {', '.join(RULES)}")
    values = {name: value.item() if isinstance(value, np.generic) else value for name, value in keywords.items()}
    try:
        return SelectSettings.model_validate(values, strict=True)  # strict: True is no rate, "0.3" no number
    except ValidationError as error:
        raise UserError(explain(error, SelectSettings)) from None


class _Tokens(NamedTuple):
    """All tokens of one side, response after response.

    Attributes:
        rewards: s, or s mixed with label statistics `[tokens]`.
        lengths: tokens of each response `[rows]`.
        eligible: the tokens that may be kept `[tokens]` bool.
    """

    rewards: np.ndarray
    lengths: np.ndarray
    eligible: np.ndarray

    def starts(self, counts: np.ndarray) -> np.ndarray:
        """The first token of a response, repeated `counts` times `[sum(counts)]`."""
        return np.repeat(np.cumsum(self.lengths) - self.lengths, counts)


def _tokens_of(scores: pa.Table, side: str, settings: SelectSettings, statistics: LabelStatistics | None) -> _Tokens:
    rewards, lengths = flat(scores.column(f"{side}_rewards"))
    ids, _ = flat(scores.column(f"{side}_ids"))
    eligible = np.ones(len(rewards), bool)
    if not settings.include_end:
        eligible &= ~turn_ends(scores, side)
    if settings.skip_shared:
        eligible &= ~shared_tokens(scores)[side]
    if settings.label_log_odds:
        assert statistics is not None
        from sepo.credit.label_log_odds import with_label_log_odds

        rewards = with_label_log_odds(rewards, ids, side, statistics, settings.label_log_odds)
    return _Tokens(rewards, lengths, eligible)


def _key_positions(
    tokens: _Tokens, scores: pa.Table, side: str, sign: int, settings: SelectSettings, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the key tokens of one side, and their number in each response; see `extreme_positions`."""
    lengths, eligible = tokens.lengths, tokens.eligible
    rule, rate = getattr(settings, f"rule_{side}"), getattr(settings, f"k_{side}")
    values = sign * tokens.rewards
    position = np.arange(len(values)) - tokens.starts(lengths)
    if rule == "random":
        order = _uniform(seed, side, np.repeat(scores.column("pair_id").to_numpy(), lengths), position)
    elif rule in ("first", "last", "shorter"):
        order = position if rule == "last" else -position
    else:
        order = -values if rule == "reversed" else values
    if rule == "threshold":
        kept = eligible & (values >= sign * getattr(settings, f"threshold_{side}"))
        counts = np.maximum(1, segment_sums(kept, lengths)).astype(np.int64)
    elif rule in ("mass", "effective"):
        counts = _adaptive_counts(rule, np.where(eligible, values, 0), lengths, rate)
    elif rule == "shorter":
        counts = np.minimum(*(flat(scores.column(f"{name}_rewards"))[1] for name in SIDES))
    else:
        counts = keep_counts(lengths, rate)
    return extreme_positions(order, lengths, counts, eligible)


def _weights(rewards: np.ndarray, counts: np.ndarray, sign: int, settings: SelectSettings) -> np.ndarray:
    """Weights of key tokens from their rewards `[sum(counts)]` float32."""
    if settings.credit == "reward":
        return rewards.astype(np.float32)
    if settings.credit == "hard":
        return np.ones(len(rewards), np.float32)
    if settings.credit == "truth":
        return np.where(sign * rewards > 0, 1, TRUTH_REST).astype(np.float32)
    scaled = rewards.astype(np.float64) / settings.temperature
    return soft_weights(sign * np.clip(scaled, settings.clip_low, settings.clip_high), counts, settings.normalise)


def pair_confidence(scores: pa.Table, scale: float) -> np.ndarray:
    """The oracle's confidence in each pair's label, a weight of the pair's loss: `[rows]` float32 from 0 to 1.

        C = max(0, 2 sigmoid(scale (sum of s over y_w - sum of s over y_l)) - 1)

    CW-PO (arXiv 2603.04968) uses the scores of a weak annotator in place of scale times these sums. With the oracle's
    beta as `scale`, the scaled sums are the DPO rewards of the oracle. In CW-PO the annotator also labels the pairs, so
    no weight is negative. Here the labels come from the data: a pair that the oracle ranks the other way gets weight 0.
    """
    chosen, rejected = (segment_sums(*flat(scores.column(f"{side}_rewards"))) for side in SIDES)
    return np.maximum(0, np.tanh(scale / 2 * (chosen - rejected))).astype(np.float32)


def soft_weights(logits: np.ndarray, counts: np.ndarray, normalise: bool = True) -> np.ndarray:
    """Weights exp(logit) of the kept tokens, with `normalise` scaled to a mean of 1 in each response.

    Returns:
        `[sum(counts)]` float32.

    >>> soft_weights(np.log([1.0, 3.0, 5.0]), np.array([2, 1])).tolist()
    [0.5, 1.5, 1.0]
    """
    weights = np.exp(logits)
    if normalise:
        means = segment_sums(weights, counts) / np.maximum(counts, 1)
        weights = weights / np.repeat(means, counts)
    return weights.astype(np.float32)


def dataset_thresholds(
    tables: Iterable[pa.Table], settings: SelectSettings, statistics: LabelStatistics | None = None
) -> SelectSettings:
    """Replace rule "dataset" by "threshold", with the threshold that keeps a share k of all tokens of a side.

    Args:
        tables: the shards of a score table; read only if a side has rule "dataset".
        statistics: needed with `settings.label_log_odds`.
    """
    sides = [(side, sign) for side, sign in SIGNED_SIDES if getattr(settings, f"rule_{side}") == "dataset"]
    if not sides:
        return settings
    values: dict[str, list[np.ndarray]] = {side: [] for side, _ in sides}
    for table in tables:
        for side, sign in sides:
            tokens = _tokens_of(table, side, settings, statistics)
            values[side].append(sign * tokens.rewards[tokens.eligible])
    thresholds: dict[str, Any] = {}
    for side, sign in sides:
        all_values = np.concatenate(values[side])
        number = max(1, int(np.floor(getattr(settings, f"k_{side}") * len(all_values) + 1e-9)))
        threshold = -np.partition(-all_values, number - 1)[number - 1] if len(all_values) else 0.0
        thresholds |= {f"rule_{side}": "threshold", f"threshold_{side}": float(sign * threshold)}
    return settings.model_copy(update=thresholds)


def _adaptive_counts(rule: str, values: np.ndarray, lengths: np.ndarray, share: float) -> np.ndarray:
    """Number of tokens to keep of each response from its reward mass, the sum of max(v, 0); at least 1: `[rows]`."""
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
    """(sum of mass)^2 / sum of mass^2 of each response: `[rows]`; n for n tokens of equal mass, 1 without mass."""
    totals, squares = segment_sums(mass, lengths), segment_sums(mass**2, lengths)
    return np.divide(totals**2, squares, out=np.ones_like(totals), where=squares > 0)


def _uniform(seed: int, side: str, pair_ids: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) that depend on the arguments alone (SplitMix64), not on the order or shards of a table."""
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


def check_rule(settings: SelectSettings) -> None:
    """Raise a UserError for settings that contradict each other."""
    if settings.credit in ("reward", "truth") and settings.label_log_odds:
        raise UserError(
            f"credit '{settings.credit}' needs rewards as they are: leave label_log_odds at 0, or choose another credit"
        )
    if settings.clip_low > settings.clip_high:
        raise UserError(f"clip_low {settings.clip_low} is above clip_high {settings.clip_high}")


def check_rate(name: str, rate: float) -> None:
    """Raise a UserError unless 0 < rate <= 1."""
    try:
        check_number(name, rate, above=0, most=1)
    except UserError:
        raise UserError(
            f"{name} is {one_line(repr(rate), 60)}: the share of tokens to keep must be above 0 and at most 1, for "
            "example 0.3"
        ) from None
