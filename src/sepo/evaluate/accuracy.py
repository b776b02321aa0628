"""Preference accuracy and its length-only baseline.

In most preference data the preferred response is the longer one (in 84 % of the pairs of a typical benchmark). So an
accuracy is reported with the accuracy of length alone, and on the pairs where length cannot help.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import compress

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from sepo.credit.rewards import response_sums
from sepo.data.ragged import SIDES, flat
from sepo.data.splits import PromptRows, prompt_numbers
from sepo.evaluate.statistics import mean_and_se


def preference_accuracy(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    chosen_lengths: ArrayLike,
    rejected_lengths: ArrayLike,
    *,
    groups: Sequence[Hashable] | np.ndarray | None = None,
) -> dict[str, float]:
    """Share of pairs whose chosen response has the higher score; a tie counts one half.

    Args:
        chosen_scores, rejected_scores: `[pairs]`, for example summed token rewards.
        chosen_lengths, rejected_lengths: `[pairs]`, response lengths in tokens.
        groups: `[pairs]`, the prompt of each pair, to cluster standard errors by.

    Returns:
        accuracy, accuracy_se: on all pairs.
        accuracy_not_longer, accuracy_not_longer_se: on pairs whose chosen response is not the longer one.
        pairs, pairs_not_longer: numbers of these pairs.
        length_baseline: accuracy of always preferring the longer response.
        An accuracy of no pairs, or a standard error of fewer than two, is NaN.

    Raises:
        ValueError: the four arrays differ in length.
    """
    arrays = [np.asarray(x, np.float64) for x in (chosen_scores, rejected_scores, chosen_lengths, rejected_lengths)]
    if len({array.shape for array in arrays}) != 1 or arrays[0].ndim != 1:
        raise ValueError(f"expected four arrays of one length, got shapes {[array.shape for array in arrays]}")
    scores, others, lengths, other_lengths = arrays
    wins = won(scores, others)
    not_longer = lengths <= other_lengths
    accuracy, accuracy_se = mean_and_se(wins, groups)
    kept: Sequence[Hashable] | np.ndarray | None = None
    if groups is not None:
        kept = np.asarray(groups)[not_longer] if isinstance(groups, np.ndarray) else list(compress(groups, not_longer))
    accuracy_not_longer, accuracy_not_longer_se = mean_and_se(wins[not_longer], kept)
    return {
        "accuracy": accuracy,
        "accuracy_se": accuracy_se,
        "accuracy_not_longer": accuracy_not_longer,
        "accuracy_not_longer_se": accuracy_not_longer_se,
        "pairs": len(wins),
        "pairs_not_longer": int(not_longer.sum()),
        "length_baseline": mean_and_se(won(lengths, other_lengths))[0],
    }


def won(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """1 where `values` is higher, 0 where `others` is, one half for ties, NaN where either is NaN: `[pairs]`."""
    # A NaN is neither higher nor lower and must not count as a tie.
    half = np.where(np.isnan(values - others) & ~(values == others), np.nan, 0.5 * (values == others))
    return (values > others) + half


def oracle_accuracy(scores: pa.Table | Iterable[pa.Table]) -> dict[str, float]:
    """Preference accuracy of the oracle's summed token rewards on the pairs of a scores table, whole or in shards."""
    if isinstance(scores, pa.Table):
        return _prefixed("oracle", _accuracy(*response_sums(scores, "rewards"), scores))
    prompts = PromptRows()
    parts = []
    for shard in scores:
        lengths = [flat(shard.column(f"{side}_ids"))[1].astype(np.int32) for side in SIDES]
        parts.append((*response_sums(shard, "rewards"), *lengths))
        prompts.add(shard)
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return _prefixed("oracle", preference_accuracy(*columns, groups=prompts.labels()))


def policy_accuracy(before: pa.Table, after: pa.Table, pairs: pa.Table) -> dict[str, float]:
    """Preference accuracy of a policy on pairs, from log-probabilities before and after training.

    `policy/accuracy` uses the implicit reward, the summed log-ratio of after to before, which is what training changed.
    `policy/accuracy_mean_logp` and `base/accuracy_mean_logp` use a response's mean log-probability, the quantity in the
    reference-free loss.
    """
    lengths = [flat(pairs.column(f"{side}_ids"))[1] for side in ("chosen", "rejected")]
    old, new = response_sums(before, "logps"), response_sums(after, "logps")
    metrics = _prefixed("policy", _accuracy(new[0] - old[0], new[1] - old[1], pairs))
    for name, sums in (("base", old), ("policy", new)):
        mean = _accuracy(sums[0] / lengths[0], sums[1] / lengths[1], pairs)
        metrics[f"{name}/accuracy_mean_logp"] = mean["accuracy"]
        metrics[f"{name}/accuracy_mean_logp_not_longer"] = mean["accuracy_not_longer"]
    return metrics


def _accuracy(chosen: np.ndarray, rejected: np.ndarray, pairs: pa.Table) -> dict[str, float]:
    lengths = [flat(pairs.column(f"{side}_ids"))[1] for side in ("chosen", "rejected")]
    return preference_accuracy(chosen, rejected, *lengths, groups=prompt_numbers(pairs).tolist())


def _prefixed(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in values.items()}
