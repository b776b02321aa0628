"""Preference pairs from sampled answers, and what their scores have to do with length.

    best-worst     the best whole answer, and the worst answer
    best-random    the best whole answer, and a random one of the answers below it
    all            every whole answer, with every answer below it

Equal answers of a prompt count once, with their mean score. A cut answer is never chosen. Ties, and pairs whose scores
differ by less than `min_gap`, give no pair. Strong against weak: an answer of a strong model is chosen over the answer
of a weak one, without any score (delta learning, OLMo 3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sepo.data.pairing import Ranked, pick_pairs
from sepo.errors import UserError
from sepo.evaluate.accuracy import won
from sepo.evaluate.statistics import mean_and_se
from sepo.files import digest
from sepo.report.edges import Measured, ranking_caution
from sepo.report.statistics import rank_correlation
from sepo.sampling.responses import CUT, NONE, messages_of, rows_of

# Share of pairs in which length and score agree (or disagree), above which length is said to explain the score.
BY_LENGTH = 0.75
_DROPS = {
    "one_answer": "prompts with fewer than two different answers that have a score",
    "no_whole_answer": "prompts whose answers are all cut off",
    "tie": "prompts whose answers all have one score",
    "gap": "prompts in which no whole answer scores higher than another, by min_gap at least",
}


class Made(NamedTuple):
    """Pairs, and how many answers and prompts did not get into them.

    Attributes:
        pairs: rows of preference data.
        counts: `prompts`, `pairs`, `merged` answers (equal to another), `cut` and `no_score` ones, and prompts without
            a pair by reason (`_DROPS`).
    """

    pairs: list[dict[str, Any]]
    counts: dict[str, int]

    def lines(self) -> list[str]:
        """The counts in words."""
        counts = self.counts
        head = f"{counts['pairs']:,} pairs of {counts['prompts']:,} prompts"
        notes = {
            "merged": "answers equal another of their prompt: counted once",
            "cut": "answers are cut off: never chosen",
            "no_score": "answers have no score: in no pair",
            **{name: f"{text}: no pair" for name, text in _DROPS.items()},
        }
        return [head, *(f"{counts[name]:,} {text}" for name, text in notes.items() if counts.get(name))]


class _Answer(NamedTuple):
    text: str
    tokens: int
    temperature: float
    end: str


def pairs_of(table: pa.Table, pick: str = "best-worst", min_gap: float = 0.0, seed: int = 0) -> Made:
    """Pairs of a responses table.

    Args:
        pick: a key of the list above.
        seed: of best-random, together with the prompt.

    Returns:
        rows with `prompt`, `chosen`, `rejected` (messages, or texts where the prompt is plain), `chosen_score`,
        `rejected_score`, `chosen_tokens`, `rejected_tokens`, `chosen_temperature`, `rejected_temperature`,
        `rejected_finish`.
    """
    counts: Counter[str] = Counter(prompts=len(table))
    rows: list[dict[str, Any]] = []
    for row in rows_of(table):
        ranked = _merged(row, counts)
        draw = np.random.default_rng(int(digest([seed, row["conversation"]]), 16) % 2**63)
        try:
            found = pick_pairs(ranked, pick, min_gap, draw)
        except LookupError as nothing:
            counts[str(nothing.args[0])] += 1
            continue
        rows += [_pair(row, chosen, rejected) for chosen, rejected in found]
    counts["pairs"] = len(rows)
    return Made(rows, dict(counts))


def _merged(row: Mapping[str, Any], counts: Counter[str]) -> list[Ranked]:
    """The different answers of a prompt that have a score, in their order; counts the others."""
    groups: dict[str, list[tuple[float, _Answer]]] = {}
    columns = ("answers", "scores", "finish_reasons", "tokens", "temperatures")
    for text, score, end, tokens, temperature in zip(*(row[name] for name in columns), strict=True):
        counts["cut"] += end == CUT
        if score is None or end == NONE:
            counts["no_score"] += 1
            continue
        groups.setdefault(text.strip(), []).append((score, _Answer(text, tokens, temperature, end)))
    counts["merged"] += sum(len(group) - 1 for group in groups.values())
    ranked = []
    for group in groups.values():
        whole = [answer for _, answer in group if answer.end != CUT]
        score = float(np.mean([score for score, _ in group]))
        ranked.append(Ranked(score, whole[0] if whole else group[0][1], bool(whole)))
    return ranked


def _pair(row: Mapping[str, Any], chosen: Ranked, rejected: Ranked) -> dict[str, Any]:
    pair = _texts(row, chosen.response.text, rejected.response.text)
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        pair[f"{name}_score"] = side.score
        pair[f"{name}_tokens"] = side.response.tokens
        pair[f"{name}_temperature"] = side.response.temperature
    return {**pair, "rejected_finish": rejected.response.end}


def _texts(row: Mapping[str, Any], chosen: str, rejected: str) -> dict[str, Any]:
    """Prompt and responses, as texts or as messages."""
    if row["plain"]:
        return {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
    answers = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", chosen), ("rejected", rejected))
    }
    return {"prompt": messages_of(row), **answers}


def strong_weak_pairs(strong: pa.Table, weak: pa.Table) -> Made:
    """Pairs without a judge: the i-th whole answer of the strong model over the i-th answer of the weak one.

    Raises:
        UserError: the tables have no prompt in common.
    """
    others = {row["conversation"]: row for row in rows_of(weak)}
    counts: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    for row in rows_of(strong):
        if (other := others.get(row["conversation"])) is None:
            continue
        counts["prompts"] += 1
        counts["cut"] += row["finish_reasons"].count(CUT)
        best = [i for i, end in enumerate(row["finish_reasons"]) if end not in (CUT, NONE)]
        worse = [i for i, end in enumerate(other["finish_reasons"]) if end != NONE]
        before = len(rows)
        for i, j in zip(best, worse, strict=False):
            if row["answers"][i].strip() == other["answers"][j].strip():
                counts["merged"] += 1
                continue
            pair = _texts(row, row["answers"][i], other["answers"][j])
            pair |= {"chosen_tokens": row["tokens"][i], "rejected_tokens": other["tokens"][j]}
            rows.append({**pair, "rejected_finish": other["finish_reasons"][j]})
        if len(rows) == before:
            counts["no_whole_answer" if not best else "one_answer"] += 1
    if not counts["prompts"]:
        raise UserError("the strong and the weak model answered no prompt in common")
    counts["pairs"] = len(rows)
    return Made(rows, dict(counts))


# --- length ---------------------------------------------------------------------------------------------------------


def length_figures(pairs: Sequence[Mapping[str, Any]], table: pa.Table | None = None) -> dict[str, float]:
    """What pairs and scores have to do with length.

    Returns:
        `length/chosen` and `length/rejected` (mean tokens), `length/gap` (chosen minus rejected) with `_se`,
        `length/longer_chosen`, the share of pairs whose chosen answer is the longer one (a tie counts a half) with
        `_se`; with a responses table `length/rank_correlation`, the mean correlation of the ranks of score and length
        among the answers of a prompt (Spearman's), with `_se`. Errors are clustered by prompt.
    """
    if not pairs:
        return {}
    lengths = np.array([[pair["chosen_tokens"], pair["rejected_tokens"]] for pair in pairs], np.float64)
    groups = [digest(pair["prompt"]) for pair in pairs]
    longer = won(lengths[:, 0], lengths[:, 1])
    figures = {"length/chosen": float(lengths[:, 0].mean()), "length/rejected": float(lengths[:, 1].mean())}
    figures["length/gap"], figures["length/gap_se"] = mean_and_se(lengths[:, 0] - lengths[:, 1], groups)
    figures["length/longer_chosen"], figures["length/longer_chosen_se"] = mean_and_se(longer, groups)
    if table is not None:
        values = np.array([_rank_correlation(row) for row in rows_of(table)])
        name, values = "length/rank_correlation", values[np.isfinite(values)]
        if len(values):
            figures[name], figures[f"{name}_se"] = mean_and_se(values)
    return figures


def _rank_correlation(row: Mapping[str, Any]) -> float:
    """Rank correlation of score and length among a prompt's answers; NaN with fewer than three, or without spread."""
    known = [(s, t) for s, t in zip(row["scores"], row["tokens"], strict=True) if s is not None]
    return rank_correlation(*zip(*known, strict=True)) if len(known) > 2 else float("nan")


def length_caution(figures: Mapping[str, float], prompts: int | None = None) -> str:
    """Why the scores of the pairs may show no preference but length; empty if they show more."""
    share, error = figures.get("length/longer_chosen"), figures.get("length/longer_chosen_se")
    if share is None:
        return ""
    whole = ranking_caution(Measured(1.0, 0.0, prompts, share=True), share, "sampled pairs")
    if whole.startswith("length explains everything"):
        return whole
    interval = Measured(share, error, prompts, share=True).interval
    if max(share, 1 - share) < BY_LENGTH or (interval is not None and interval[0] <= 0.5 <= interval[1]):
        return ""
    return (
        f"length explains most of the score: the {'longer' if share > 0.5 else 'shorter'} answer is chosen in "
        f"{max(share, 1 - share):.0%} of the pairs, so a policy may learn length alone"
    )


def length_line(figures: Mapping[str, float]) -> str:
    """The figures in one line."""
    if not figures:
        return "no pairs, so nothing is known about their lengths"
    text = (
        f"tokens: chosen {figures['length/chosen']:.1f}, rejected {figures['length/rejected']:.1f}, difference "
        f"{figures['length/gap']:+.1f}; the longer one is chosen in {figures['length/longer_chosen']:.0%} of the pairs"
    )
    if "length/rank_correlation" in figures:
        text += f"; rank correlation of score and length {figures['length/rank_correlation']:+.2f}"
    return text
