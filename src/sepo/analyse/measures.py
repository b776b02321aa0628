"""Measures of the token rewards in a score table, and of how far to trust them.

From one score table: how few tokens carry the reward, their positions, their classes, and the effect of length. From
several tables of the same pairs: agreement between oracles, and how much of the selection changes with the oracle's
data. With the word values of a gold reward: whether the rewards find the words that matter, beside baselines without an
oracle. All are pure functions of flat rewards and lengths; no function runs a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from sepo.credit.rewards import response_sums
from sepo.credit.selection import effective_number, select_key_tokens, turn_ends
from sepo.data.ragged import SIGNED_SIDES, flat, ragged
from sepo.data.splits import prompt_numbers
from sepo.data.tables import make_table, provenance_of
from sepo.data.vocabulary import special_ids
from sepo.evaluate.accuracy import preference_accuracy
from sepo.evaluate.fidelity import combine, fidelity, token_truth
from sepo.evaluate.words import Truth
from sepo.report.statistics import auc, correlation, rank_correlation
from sepo.report.summary import cumulative_share

POSITION_BINS = 10
CLASSES = ("word", "continuation", "number", "punctuation", "space", "special")


def concentration(scores: pa.Table, points: int = 101) -> dict[str, Any]:
    """Share of the reward carried by a share of the tokens, largest first, mean over responses.

    `magnitude` is the share of the sum of |s|; `mass` the share of the sum of max(v, 0), the reward in favour of the
    label (v = s in chosen, -s in rejected responses). `share_for_80` is the share of tokens that carries 80 % of the
    reward, both sides together; the paper reports 35 to 40 % for the reward difference.
    """
    shares = np.linspace(0, 1, points)
    result: dict[str, Any] = {"share": shares.tolist()}
    for kind in ("magnitude", "mass"):
        curves = {}
        for side, sign in SIGNED_SIDES:
            rewards, lengths = flat(scores.column(f"{side}_rewards"))
            values = np.abs(rewards) if kind == "magnitude" else np.maximum(sign * rewards, 0)
            curve = cumulative_share(values, lengths, shares)
            if curve is not None:
                curves[side] = curve
        both = np.mean(list(curves.values()), axis=0) if curves else None
        result[kind] = {
            **{side: curve.tolist() for side, curve in curves.items()},
            "share_for_80": None if both is None else float(np.interp(0.8, both, shares)),
        }
    return result


def by_position(scores: pa.Table, selection: pa.Table) -> dict[str, Any]:
    """Mean s and share of key tokens in each tenth of the response, by side."""
    result = {}
    for side, _ in SIGNED_SIDES:
        rewards, lengths = flat(scores.column(f"{side}_rewards"))
        within = np.arange(len(rewards)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        bins = (within * POSITION_BINS) // np.maximum(np.repeat(lengths, lengths), 1)
        number = np.bincount(bins, minlength=POSITION_BINS)
        key = key_mask(selection, side, lengths)
        result[side] = {
            "tokens": number.tolist(),
            "mean": _ratio(np.bincount(bins, rewards.astype(np.float64), POSITION_BINS), number),
            "key_share": _ratio(np.bincount(bins, key.astype(np.float64), POSITION_BINS), number),
        }
    return result


def token_classes(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Class of each token, as an index into `CLASSES`.

    Args:
        ids: `[tokens]`.
        first: `[tokens]` bool, the first token of a response, which starts a word without a space before it.
    """
    unique, inverse = np.unique(ids, return_inverse=True)
    special = special_ids(tokenizer)
    starts_with_space = ("Ġ", "▁", " ", "Ċ")
    kinds = np.empty(len(unique), np.int64)
    for index, token in enumerate(unique.tolist()):
        raw = str(tokenizer.convert_ids_to_tokens(token))
        text = str(tokenizer.decode([token]))
        if token in special:
            kind = "special"
        elif not text.strip():
            kind = "space"
        elif any(character.isalpha() for character in text):
            kind = "word" if raw.startswith(starts_with_space) else "continuation"
        elif any(character.isdigit() for character in text):
            kind = "number"
        else:
            kind = "punctuation"
        kinds[index] = CLASSES.index(kind)
    classes = kinds[inverse]
    return np.where(first & (classes == CLASSES.index("continuation")), CLASSES.index("word"), classes)


def by_class(scores: pa.Table, selection: pa.Table, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """By side and token class: share of all tokens, of key tokens and of the sum of |s|, and mean s."""
    result: dict[str, Any] = {}
    for side, _ in SIGNED_SIDES:
        ids, lengths = flat(scores.column(f"{side}_ids"))
        rewards, _ = flat(scores.column(f"{side}_rewards"))
        first = np.zeros(len(ids), bool)
        first[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        classes = token_classes(tokenizer, ids, first)
        count = len(CLASSES)
        number = np.bincount(classes, minlength=count)
        key = np.bincount(classes, key_mask(selection, side, lengths).astype(np.float64), count)
        magnitude = np.bincount(classes, np.abs(rewards.astype(np.float64)), count)
        sums = np.bincount(classes, rewards.astype(np.float64), count)
        result[side] = {
            name: {
                "tokens": int(number[index]),
                "share": float(number[index] / max(len(ids), 1)),
                "key_share": float(key[index] / max(key.sum(), 1)),
                "magnitude_share": float(magnitude[index] / magnitude.sum()) if magnitude.sum() else None,
                "mean": float(sums[index] / number[index]) if number[index] else None,
            }
            for index, name in enumerate(CLASSES)
        }
    return result


def length_effects(scores: pa.Table) -> dict[str, Any]:
    """The effect of length on a response's summed and mean reward.

    For both: preference accuracy (over all pairs, and over pairs whose chosen response is not the longer one, where
    length cannot help), and the rank correlation of reward and length over responses, by side. `length_baseline` is
    the accuracy of preferring the longer response.
    """
    lengths = {side: flat(scores.column(f"{side}_ids"))[1] for side, _ in SIGNED_SIDES}
    sums = dict(zip(("chosen", "rejected"), response_sums(scores, "rewards"), strict=True))
    prompts = prompt_numbers(scores).tolist()
    result: dict[str, Any] = {}
    for name in ("sum", "mean"):
        values = {side: sums[side] / (lengths[side] if name == "mean" else 1) for side, _ in SIGNED_SIDES}
        judged = preference_accuracy(*values.values(), *lengths.values(), groups=prompts)
        result[name] = {
            **{
                key: judged[key] for key in ("accuracy", "accuracy_se", "accuracy_not_longer", "accuracy_not_longer_se")
            },
            **{f"length_correlation_{side}": rank_correlation(values[side], lengths[side]) for side, _ in SIGNED_SIDES},
            "margin_length_correlation": rank_correlation(
                values["chosen"] - values["rejected"], lengths["chosen"] - lengths["rejected"]
            ),
        }
        result |= {"length_baseline": judged["length_baseline"], "pairs_not_longer": judged["pairs_not_longer"]}
    return result


def agreement(tables: Mapping[str, pa.Table], k: float) -> dict[str, Any]:
    """Agreement between the oracles of every two tables, and the change of the selection against the last table.

    `correlation` is Pearson's over all tokens of a side, averaged over sides; `same_sign` the share of tokens whose
    rewards have the same sign; `overlap` the share of common key tokens at rate k. `chance` is the overlap of two
    random selections. `changed` is 1 - overlap with the last table: the share of the selection that more oracle data
    would change.
    """
    names = list(tables)
    rewards = {name: [flat(tables[name].column(f"{side}_rewards"))[0] for side, _ in SIGNED_SIDES] for name in names}
    lengths = [flat(tables[names[0]].column(f"{side}_ids"))[1] for side, _ in SIGNED_SIDES]
    selections = {name: select_key_tokens(tables[name], k, k) for name in names}
    masks = {
        name: [key_mask(selections[name], side, lengths[index]) for index, (side, _) in enumerate(SIGNED_SIDES)]
        for name in names
    }
    last = masks[names[-1]]
    counts = [np.bincount(np.repeat(np.arange(len(n)), n), mask, len(n)) for n, mask in zip(lengths, last, strict=True)]
    expected = sum(float(np.sum(c**2 / np.maximum(n, 1))) for c, n in zip(counts, lengths, strict=True))
    total = sum(float(c.sum()) for c in counts)

    def compare(a: str, b: str) -> dict[str, float]:
        pairs = list(zip(rewards[a], rewards[b], strict=True))
        kept = list(zip(masks[a], masks[b], strict=True))
        return {
            "correlation": float(np.mean([correlation(x, y) for x, y in pairs])),
            "same_sign": float(np.mean(np.concatenate([np.sign(x) == np.sign(y) for x, y in pairs]))),
            "overlap": float(sum((x & y).sum() for x, y in kept) / sum(x.sum() for x, _ in kept)),
        }

    between = [{"a": a, "b": b, **compare(a, b)} for i, a in enumerate(names) for b in names[i + 1 :]]
    changed = {name: 1 - compare(name, names[-1])["overlap"] for name in names[:-1]}
    return {"between": between, "changed": changed, "chance": expected / total if total else None}


def truth(
    scores: Mapping[str, pa.Table],
    tokenizer: PreTrainedTokenizerBase,
    known: Truth,
    k: float,
    reference: pa.Table | None,
    seed: int,
) -> dict[str, Any]:
    """Compare token rewards with the values of words in a gold reward (`known`), beside baselines without an oracle.

    Baselines rank the same tokens first on both sides: `random`; `position`, early tokens; `surprisal`, tokens that
    are improbable under the reference.

    Returns:
        By table and baseline: `auc` and `auc_se` (sign-aware, see `evaluate.fidelity`), `prompts`; `auc_unsigned` (|s|
        of words with a value against |s| of others); `correlation` and `rank_correlation` of s with the word's value
        over word tokens (mean of the sides); the share of key tokens at rate k in positive words of chosen responses
        (`precision_chosen`) and in negative words of rejected responses (`precision_rejected`), and the ratios of
        these shares to those of all tokens (`lift_chosen`, `lift_rejected`).
    """
    first = next(iter(scores.values()))
    values = {side: token_truth(tokenizer, first, side, known) for side, _ in SIGNED_SIDES}
    candidates = {**scores, **baseline_tables(first, reference, seed)}
    result = {}
    for name, table in candidates.items():
        judged = fidelity(tokenizer, table, select_key_tokens(table, k, k), truth=known, seed=seed)
        row = {key: judged[key] for key in ("auc", "auc_se", "precision_chosen", "precision_rejected")}
        row["prompts"] = len(set(prompt_numbers(table).tolist()))
        unsigned, linear, ranked = [], [], []
        for side, _ in SIGNED_SIDES:
            rewards = flat(table.column(f"{side}_rewards"))[0].astype(np.float64)
            word = ~np.isnan(values[side])
            carries = word & (values[side] != 0)
            unsigned.append((auc(np.abs(rewards[carries]), np.abs(rewards[word & ~carries])), float(carries.sum())))
            linear.append(correlation(rewards[word], values[side][word]))
            ranked.append(rank_correlation(rewards[word], values[side][word]))
            base = judged[f"base_rate_{side}"]
            row[f"lift_{side}"] = judged[f"precision_{side}"] / base if base else float("nan")
        row["auc_unsigned"] = combine(unsigned)
        row["correlation"], row["rank_correlation"] = float(np.mean(linear)), float(np.mean(ranked))
        result[name] = row
    return result


def baseline_tables(scores: pa.Table, reference_logps: pa.Table | None, seed: int) -> dict[str, pa.Table]:
    """Score tables of the baselines: random, position and (with log-probabilities) surprisal."""
    rng = np.random.default_rng(seed)
    columns: dict[str, dict[str, object]] = {name: {} for name in ("random", "position", "surprisal")}
    for side, sign in SIGNED_SIDES:
        _, lengths = flat(scores.column(f"{side}_ids"))
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        order = {"random": rng.normal(size=len(within)), "position": -within.astype(np.float64)}
        if reference_logps is not None:
            order["surprisal"] = -flat(reference_logps.column(f"{side}_logps"))[0].astype(np.float64)
        for name, values in order.items():
            columns[name][f"{side}_rewards"] = ragged((sign * values).astype(np.float32), lengths)
    keys = {name: scores.column(name) for name in scores.column_names if not name.endswith("_rewards")}
    provenance = provenance_of(scores)
    return {name: make_table("scores", {**keys, **rewards}, provenance) for name, rewards in columns.items() if rewards}


def overview(scores: pa.Table) -> dict[str, Any]:
    """Counts, mean and standard deviation of the rewards (a first temperature for soft credit), and rewards of ends."""
    result: dict[str, Any] = {"pairs": len(scores)}
    for side, sign in SIGNED_SIDES:
        rewards, lengths = flat(scores.column(f"{side}_rewards"))
        mass = np.maximum(sign * rewards.astype(np.float64), 0)
        effective = effective_number(mass, lengths)
        ended = turn_ends(scores, side)
        result[side] = {
            "tokens": len(rewards),
            "mean_length": float(lengths.mean()),
            "mean": float(rewards.mean()),
            "sd": float(rewards.std()),
            "effective_share": float(np.mean(effective / np.maximum(lengths, 1))),
            "mean_end": float(rewards[ended].mean()) if ended.any() else None,
        }
    return result


def key_mask(selection: pa.Table, side: str, lengths: np.ndarray) -> np.ndarray:
    """Mark the selected tokens of a side: `[tokens]` bool."""
    positions, counts = flat(selection.column(f"{side}_positions"))
    mask = np.zeros(int(lengths.sum()), bool)
    mask[np.repeat(np.cumsum(lengths) - lengths, counts) + positions] = True
    return mask


def _ratio(sums: np.ndarray, number: np.ndarray) -> list[float | None]:
    return [float(total / count) if count else None for total, count in zip(sums, number, strict=True)]
