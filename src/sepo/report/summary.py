"""The numbers behind the report's figures, over a whole score table.

Pure functions of flat rewards and response lengths. A figure is a plain dict of lists; the page and matplotlib draw
the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from sepo.data.ragged import segment_sums
from sepo.evaluate.accuracy import won

CHART_POINTS = 600


def cumulative_share(rewards: np.ndarray, lengths: np.ndarray, shares: np.ndarray) -> np.ndarray | None:
    """Share of a response's total |s| that its largest tokens carry, averaged over responses.

    Args:
        rewards: token rewards of all responses `[sum of lengths]`.
        lengths: tokens in each response `[rows]`.
        shares: shares of tokens in [0, 1] `[points]`.

    Returns:
        The mean share of Σ|s| `[points]`, or None where every reward is zero.
    """
    magnitude = np.abs(rewards.astype(np.float64))
    rows = np.repeat(np.arange(len(lengths)), lengths)
    ordered = magnitude[np.lexsort((-magnitude, rows))]
    running = np.concatenate([[0.0], np.cumsum(ordered)])
    starts = np.cumsum(lengths) - lengths
    totals = running[starts + lengths] - running[starts]
    usable = totals > 0
    if not usable.any():
        return None
    starts, totals, counts = starts[usable], totals[usable], lengths[usable]
    means = np.empty(len(shares))
    for i, share in enumerate(shares):
        # Between whole tokens the curve is linear, so short and long responses average on one grid.
        place = share * counts
        lower = np.minimum(np.floor(place).astype(np.int64), counts)
        upper = np.minimum(lower + 1, counts)
        below, above = running[starts + lower], running[starts + upper]
        carried = below + (above - below) * (place - lower) - running[starts]
        means[i] = np.mean(carried / totals)
    return means


def _cumulative_figure(sides: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict | None:
    shares = np.linspace(0, 1, 101)
    curves = {side: cumulative_share(rewards, lengths, shares) for side, (rewards, lengths) in sides.items()}
    known = {side: curve for side, curve in curves.items() if curve is not None}
    if not known:
        return None
    both = np.mean(list(known.values()), axis=0)
    return {
        "share": shares.tolist(),
        **{side: np.round(curve, 5).tolist() for side, curve in known.items()},
        "share_for_80": float(np.interp(0.8, both, shares)),
    }


def _histogram(groups: Mapping[str, np.ndarray], bins: int) -> dict:
    """Shares of each group in common bins over the central 99 % of all values; values outside are not counted."""
    everything = np.concatenate(list(groups.values())).astype(np.float64)
    low, high = np.quantile(everything, [0.005, 0.995])
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)
    shares = {}
    for name, values in groups.items():
        counts, _ = np.histogram(values.astype(np.float64), edges)
        shares[name] = np.round(counts / max(len(values), 1), 6).tolist()
    return {"edges": edges.tolist(), **shares}


def _position_edges(longest: int) -> np.ndarray:
    """Bucket edges: single tokens first, then ranges that widen by 12 %."""
    edges = [0]
    while edges[-1] < longest:
        edges.append(max(edges[-1] + 1, int(edges[-1] * 1.12)))
    return np.array(edges)


def _position_figure(sides: Mapping[str, tuple[np.ndarray, np.ndarray]], prompts: np.ndarray) -> dict:
    """Mean reward by position in the response, with a 95 % interval of the mean by Student's t.

    The errors are clustered by prompt, as in `mean_and_se`: tokens of one response depend on each other, and so do
    responses to one prompt. The mean of a single prompt has no interval.
    """
    lengths = np.concatenate([lengths for _, lengths in sides.values()])
    edges = _position_edges(max(1, int(np.quantile(lengths, 0.95))))
    from scipy import special

    # The bucket is drawn at the middle of its positions, counted from 1.
    figure: dict = {"position": ((edges[:-1] + edges[1:] + 1) / 2).tolist()}
    for side, (rewards, counts) in sides.items():
        n, mean, squares, clusters = _by_position(rewards, counts, prompts, edges)
        correction = np.where(clusters > 1, clusters / np.maximum(clusters - 1, 1), 0)
        single = clusters < 2
        error = special.stdtrit(np.maximum(clusters - 1, 1), 0.975) * np.sqrt(correction * squares) / np.maximum(n, 1)
        figure[side] = {
            name: [None if skip else float(value) for value, skip in zip(np.round(line, 6), skipped, strict=True)]
            for name, line, skipped in (
                ("mean", mean, n == 0), ("low", mean - error, single), ("high", mean + error, single)
            )
        }  # fmt: skip
    return figure


def _by_position(rewards: np.ndarray, counts: np.ndarray, prompts: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Of the tokens between two edges: their number, mean, the sum over prompts of their squared summed residuals, and
    the number of prompts: `[4, buckets]`. Bucket by bucket, because sorting all tokens takes 70 bytes a token.
    """
    position = np.arange(len(rewards), dtype=np.int32) - np.repeat(np.int32(np.cumsum(counts) - counts), counts)
    prompt = np.repeat(np.int32(prompts), counts)
    found = []
    for low, high in pairwise(edges):
        inside = (position >= low) & (position < high)
        values, groups = rewards[inside].astype(np.float64), prompt[inside]
        mean = values.sum() / max(len(values), 1)
        residuals = np.bincount(groups, values - mean)
        found.append((len(values), mean, np.sum(residuals**2), np.count_nonzero(np.bincount(groups))))
    return np.array(found, np.float64).T


def summarise(sides: Mapping[str, tuple[np.ndarray, np.ndarray]], prompts: np.ndarray) -> dict:
    """Summarise a score table.

    Args:
        sides: for "chosen" and "rejected", the flat token rewards `[tokens]` and the lengths `[pairs]`; of answers,
            which are no pairs, for "chosen" only.
        prompts: the number of each pair's prompt `[pairs]` (`data.splits.prompt_numbers`).

    Returns:
        Plain numbers and lists: `pairs`, `tokens`, `accuracy` (share of pairs whose chosen response has the higher
        summed reward, ties one half), `chosen_longer`, `colour_limit` (|s| at which the colour scale ends) and the
        figures `cumulative`, `rewards`, `margins` (of answers: their sums) and `positions`.
    """
    sums = {side: segment_sums(*values) for side, values in sides.items()}
    others = sums.get("rejected", np.zeros_like(sums["chosen"]))
    other_lengths = sides["rejected"][1] if "rejected" in sides else sides["chosen"][1]
    margins = sums["chosen"] - others
    magnitude = np.abs(np.concatenate([values for values, _ in sides.values()]))
    limit = float(np.quantile(magnitude, 0.98)) if len(magnitude) else 0.0
    return {
        "pairs": len(margins),
        "tokens": len(magnitude),
        "accuracy": float(np.mean(won(sums["chosen"], others))),
        "chosen_longer": float(np.mean(sides["chosen"][1] > other_lengths)),
        "colour_limit": limit or 1.0,
        "cumulative": _cumulative_figure(sides),
        "rewards": _histogram({side: values for side, (values, _) in sides.items()}, 80),
        "margins": _histogram({"pairs": margins}, int(np.clip(np.sqrt(len(margins)) * 2, 10, 60))),
        "positions": _position_figure(sides, prompts),
    }


_FIRST_CURVES = [
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "rewards",
    "logps",
    "grad_norm",
    "learning_rate",
]


def training_curves(log_history: Sequence[Mapping]) -> list[dict]:
    """Sort a Trainer's `log_history` into charts.

    A chart holds one quantity. Training and evaluation, chosen and rejected side are series of one chart. The last
    entry of a log (run time, throughput) is left out.

    >>> training_curves([{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}, {"step": 2, "eval_loss": 0.65}])
    [{'name': 'loss', 'series': [{'name': 'training', 'step': [1, 2], 'value': [0.7, 0.6]}, \
{'name': 'evaluation', 'step': [2], 'value': [0.65]}]}]
    """
    charts: dict[str, dict[str, dict[str, list]]] = {}
    for entry in log_history:
        step = entry.get("step")
        if "train_runtime" in entry or not isinstance(step, int | float):
            continue
        for key, value in entry.items():
            if key in {"step", "epoch"} or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not np.isfinite(value) or key.endswith(("_runtime", "_per_second")):
                continue
            chart, series = _chart_of(key)
            points = charts.setdefault(chart, {}).setdefault(series, {"step": [], "value": []})
            points["step"].append(step)
            points["value"].append(value)
    order = sorted(charts, key=lambda name: (_FIRST_CURVES.index(name) if name in _FIRST_CURVES else 99, name))
    return [
        {
            "name": name,
            "series": [{"name": label, **_thinned(points)} for label, points in charts[name].items()],
        }
        for name in order
    ]


def _chart_of(key: str) -> tuple[str, str]:
    """The chart and the series of a log key: `eval_rewards/chosen` -> ("rewards", "chosen, evaluation")."""
    evaluation = key.startswith("eval_")
    key = key.removeprefix("eval_")
    chart, _, last = key.rpartition("/")
    if chart and last in {"chosen", "rejected"}:
        return chart, f"{last}, evaluation" if evaluation else last
    return key, "evaluation" if evaluation else "training"


def _thinned(points: Mapping[str, list]) -> dict[str, list]:
    count = len(points["step"])
    keep = np.unique(np.linspace(0, count - 1, min(count, CHART_POINTS)).round().astype(int))
    return {name: [values[i] for i in keep] for name, values in points.items()}
