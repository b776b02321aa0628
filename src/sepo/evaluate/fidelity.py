"""Fidelity of token rewards: do they find the tokens that matter? A check against a known truth.

A gold reward (`gold.py`) defines the words that carry the preference: with VADER the good and the bad words of its
lexicon; with `plain` the long words, all bad; with a planted task the right and the wrong steps. A faithful token
reward s_i is high on positive words and low on negative ones, compared with the other words of the same response side:

    AUC_positive = P(s of a positive word's token > s of another word's token)      ties count one half
    AUC_negative = P(s of a negative word's token < s of another word's token)

0.5 is chance, 1 is perfect. Each side (chosen, rejected) is compared within itself, because DPO moves the two sides by
different amounts, which alone would raise the AUC. Only tokens of words count: punctuation and special tokens are
neither targets nor "other words", because telling a word from a full stop is easy. Each word counts by itself: in "not
good" the word "good" is positive, which costs some AUC.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from sepo.data.conversation import CONVERSATION, in_words, read_conversation
from sepo.data.ragged import SIDES
from sepo.data.splits import prompt_numbers
from sepo.evaluate.words import Truth, token_values

Columns: TypeAlias = pa.Table | Mapping[str, Sequence[Sequence]]


def weighted_auc(codes: np.ndarray, target_weights: np.ndarray, other_weights: np.ndarray) -> float:
    """Weighted AUC of values given as ranks `codes` (equal values have equal ranks), in linear time."""
    targets = np.bincount(codes, target_weights)
    others = np.bincount(codes, other_weights)
    total = targets.sum() * others.sum()
    if total == 0:
        return float("nan")
    below = np.cumsum(others) - others
    return float(targets @ (below + others / 2) / total)


def fidelity(
    tokenizer: PreTrainedTokenizerBase,
    columns: Columns,
    selection: Columns | None = None,
    *,
    truth: Truth,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, float]:
    """Compare token rewards with the words that carry the gold reward (the module's text defines the comparison).

    Args:
        columns: a score table, or lists under its names: chosen_ids, rejected_ids, chosen_rewards, rejected_rewards,
            and optionally conversation, prompt_ids and prompt_key; without the last two each pair counts as a separate
            prompt.
        selection: a selection table of the same pairs, or lists chosen_positions and rejected_positions.
        truth: what each word is worth (`GoldReward.truth`).
        resamples: bootstrap resamples of the prompts for the standard error. All pairs of a prompt are drawn together,
            because they share responses.

    Returns:
        auc, auc_se: over both sides and signs, each weighted by its number of target tokens.
        auc_chosen, auc_rejected, auc_positive, auc_negative: the same over one side or one sign.
        tokens_positive, tokens_negative, tokens_other: word tokens, both sides together.
        With a selection also precision_chosen, the share of its tokens in positive words, and precision_rejected, in
        negative words; base_rate_chosen and base_rate_rejected, the same shares of all tokens.
        An AUC or a precision without such words is NaN.

    Raises:
        ValueError: rewards are not as long as their ids, or the selection is of other pairs.
    """
    sides = [_Side(tokenizer, columns, side, truth) for side in SIDES]
    pairs = sides[0].pairs
    cells = {(side.name, sign): side.cell(sign, np.ones(pairs)) for side in sides for sign in (1, -1)}
    has_prompts = "prompt_ids" in (columns.column_names if isinstance(columns, pa.Table) else columns)
    prompt = prompt_numbers(columns) if has_prompts else np.arange(pairs)
    result = {
        "auc": combine(cells.values()),
        "auc_se": _bootstrap_error(sides, prompt, resamples, seed),
        **{f"auc_{side}": combine(cells[side, sign] for sign in (1, -1)) for side in SIDES},
        "auc_positive": combine(cells[side, 1] for side in SIDES),
        "auc_negative": combine(cells[side, -1] for side in SIDES),
        "tokens_positive": sum(int((side.valences > 0).sum()) for side in sides),
        "tokens_negative": sum(int((side.valences < 0).sum()) for side in sides),
        "tokens_other": sum(int((side.valences == 0).sum()) for side in sides),
    }
    if selection is not None:
        _check_same_pairs(columns, selection)
        for side, sign in zip(sides, (1, -1), strict=True):
            hits = side.valences * sign > 0
            chosen = side.flat_positions(_lists(selection, f"{side.name}_positions"))
            result[f"precision_{side.name}"] = _share(hits[chosen]) if hits.any() else float("nan")
            result[f"base_rate_{side.name}"] = _share(hits)
    return result


def _bootstrap_error(sides: Sequence[_Side], prompt: np.ndarray, resamples: int, seed: int) -> float:
    """Standard error of the overall AUC under resampling of the prompts; `prompt` `[pairs]` numbers them from 0."""
    prompts = int(prompt.max(initial=-1)) + 1
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples if prompts > 1 else 0):
        drawn = np.bincount(rng.integers(prompts, size=prompts), minlength=prompts).astype(np.float64)
        weights = drawn[prompt]
        draws.append(combine(side.cell(sign, weights) for side in sides for sign in (1, -1)))
    defined = np.array([draw for draw in draws if not np.isnan(draw)])
    return float(defined.std(ddof=1)) if len(defined) > 1 else float("nan")


def token_truth(tokenizer: PreTrainedTokenizerBase, columns: Columns, side: str, truth: Truth) -> np.ndarray:
    """What each token of one response side is worth (`token_values`), all responses in a row: `[tokens]` float64."""
    ids = _lists(columns, f"{side}_ids")
    known = CONVERSATION in (columns.column_names if isinstance(columns, pa.Table) else columns)
    conversations = _lists(columns, CONVERSATION) if known else []
    questions = [in_words(read_conversation(text).messages) for text in conversations] or [""] * len(ids)
    values = (token_values(tokenizer, row, truth, asked) for row, asked in zip(ids, questions, strict=True))
    return np.concatenate([np.zeros(0), *values])


class _Side:
    """All tokens of one response side, flat: their pair, valence and reward (as a rank)."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        columns: Columns,
        name: str,
        truth: Truth,
    ):
        ids, rewards = _lists(columns, f"{name}_ids"), _lists(columns, f"{name}_rewards")
        lengths = [len(response) for response in ids]
        if lengths != [len(response) for response in rewards]:
            raise ValueError(f"{name}_rewards are not as long as {name}_ids")
        self.name = name
        self.pairs = len(ids)
        self.lengths = np.array(lengths, dtype=np.int64)
        self.pair = np.repeat(np.arange(self.pairs), self.lengths)
        self.valences = token_truth(tokenizer, columns, name, truth)
        values = np.concatenate([np.zeros(0), *(np.asarray(response, np.float64) for response in rewards)])
        self.codes = np.unique(values, return_inverse=True)[1]

    def cell(self, sign: int, weights: np.ndarray) -> tuple[float, float]:
        """(AUC, total weight of the target tokens) of one sign, with pairs weighted by `weights` `[pairs]`."""
        of_token = weights[self.pair]
        targets = of_token * (self.valences * sign > 0)
        value = weighted_auc(self.codes, targets, of_token * (self.valences == 0))
        return (value if sign > 0 else 1 - value), float(targets.sum())

    def flat_positions(self, positions: Sequence[Sequence[int]]) -> np.ndarray:
        if len(positions) != self.pairs:
            raise ValueError(f"{len(positions)} rows of {self.name}_positions for {self.pairs} pairs")
        starts = np.cumsum(self.lengths) - self.lengths
        shifted = (start + np.asarray(row, np.int64) for start, row in zip(starts, positions, strict=True))
        return np.concatenate([np.zeros(0, np.int64), *shifted])


def combine(cells: Iterable[tuple[float, float]]) -> float:
    """Weighted mean of (value, weight), without NaN values; NaN if there are no others."""
    defined = [(value, weight) for value, weight in cells if not np.isnan(value)]
    if not defined:
        return float("nan")
    values, weights = zip(*defined, strict=True)
    return float(np.average(values, weights=weights))


def _share(hits: np.ndarray) -> float:
    return float(hits.mean()) if len(hits) else float("nan")


def _lists(columns: Columns, name: str) -> list:
    column = columns[name]
    return column.to_pylist() if isinstance(column, pa.Array | pa.ChunkedArray) else list(column)


def _check_same_pairs(columns: Columns, selection: Columns) -> None:
    if isinstance(columns, pa.Table) and isinstance(selection, pa.Table) and columns["pair_id"] != selection["pair_id"]:
        raise ValueError("the selection is of other pairs: their pair_id columns differ")
