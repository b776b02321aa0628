"""The results of the laboratory as Markdown, JSON and a figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sepo.bench.laboratory.study import INFINITE
from sepo.bench.laboratory.tree import KINDS
from sepo.files import write_json, write_text
from sepo.numbers import number, share
from sepo.report.figures import MARKERS, SERIES, make_figure, write_png
from sepo.report.statistics import interval, over_seeds

TRUTHS = ("advantage", "start's advantage", "value change", "Q", "token reward")
BASE = "all tokens (SimPO)"


def write_results(results: Mapping[str, Any], folder: Path) -> Path:
    """Write laboratory.json, error.png and laboratory.md; return the page."""
    write_json(folder / "laboratory.json", results)
    write_png(_error_figure(results), folder / "error.png")
    page = folder / "laboratory.md"
    write_text(page, laboratory_markdown(results))
    return page


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def with_interval(values: Sequence[float], form: str = "+.2f") -> str:
    """A mean over seeds with its 95 % interval."""
    mean, error = over_seeds(list(values))
    low, high = interval(mean, error, len(values))
    return f"{number(mean, form)} ({number(low, form)} to {number(high, form)})"


def laboratory_markdown(results: Mapping[str, Any]) -> str:
    """The results as a Markdown page; docs/compare.md explains them."""
    settings, kinds = results["settings"], results["kinds"]
    sizes = [str(size) for size in settings["sizes"]]
    return "\n".join(
        [
            "# The laboratory of token credit",
            "",
            f"{settings['seeds']} worlds of each kind, β {settings['beta']:g}; means over worlds with 95 % intervals "
            "(Student's t).",
            "",
            *_table(("reward", "is"), [(kind, KINDS[kind]) for kind in kinds]),
            "## What s estimates",
            "",
            "Correlation of s with each truth: an exact oracle (infinitely many pairs), and the recurrent oracles.",
            "",
            *_estimates(kinds, sizes),
            "## How fast",
            "",
            "Share of the advantage's Σ A² that s leaves unexplained, and its slope over the pairs, both logarithmic.",
            "",
            *_errors(kinds, sizes),
            "![Error of s against pairs](error.png)",
            "",
            "## Key tokens",
            "",
            f"Key tokens (the best {results['top']:.0%} of a response) in common with the true advantage's.",
            "",
            *_key_tokens(kinds, sizes),
            "## What credit gains",
            "",
            f"Gain of a policy at KL {settings['kl']:g}, as a share of the most that any policy can gain there; "
            "means over kinds of reward.",
            "",
            *_gains(kinds, settings["policy_sizes"]),
        ]
    )


def _estimates(kinds: Mapping[str, Any], sizes: Sequence[str]) -> list[str]:
    rows = []
    for kind, result in kinds.items():
        for name, row in [
            ("exact", result["oracles"]["table"]["by pairs"][INFINITE]),
            *((f"{int(size):,} pairs", result["oracles"]["recurrent"]["by pairs"][size]) for size in sizes),
            ("barely trained", result["oracles"]["recurrent"]["barely trained"]),
            ("noise-free labels", result["oracles"]["recurrent"]["noise-free labels"]),
        ]:
            rows.append((f"{kind}, {name}", *(number(np.mean(row[truth]["pearson"]), "+.2f") for truth in TRUTHS)))
    return _table(("reward, oracle", *TRUTHS), rows)


def _errors(kinds: Mapping[str, Any], sizes: Sequence[str]) -> list[str]:
    rows = []
    for kind, result in kinds.items():
        for model in result["oracles"]:
            oracle = result["oracles"][model]
            errors = (share(np.mean(oracle["by pairs"][size]["advantage"]["error"])) for size in sizes)
            rows.append((f"{kind}, {model}", *errors, with_interval(oracle["rate"])))
    return _table(("reward, oracle", *(f"{int(size):,}" for size in sizes), "slope"), rows)


def _key_tokens(kinds: Mapping[str, Any], sizes: Sequence[str]) -> list[str]:
    rows = [
        (
            kind,
            *(share(np.mean(result["oracles"]["recurrent"]["by pairs"][size]["key tokens"])) for size in sizes),
            share(result["key tokens by chance"]),
        )
        for kind, result in kinds.items()
    ]
    return _table(("reward", *(f"{int(size):,}" for size in sizes), "chance"), rows)


def gains_over_kinds(kinds: Mapping[str, Any], size: int, method: str) -> np.ndarray:
    """Share of the attainable gain, the mean over kinds, for each seed."""
    return np.mean([result["policies"][str(size)][method] for result in kinds.values()], 0)


def _gains(kinds: Mapping[str, Any], sizes: Sequence[int]) -> list[str]:
    methods = next(iter(kinds.values()))["policies"][str(sizes[0])]
    rows = []
    for method in methods:
        cells = []
        for size in sizes:
            gains = gains_over_kinds(kinds, size, method)
            gap = gains - gains_over_kinds(kinds, size, BASE)
            cells += [share(gains.mean()), "" if method == BASE else with_interval(gap)]
        rows.append((method, *cells))
    header = [name for size in sizes for name in (f"{size:,} pairs", f"against {BASE}")]
    return _table(("method", *header), rows)


def _error_figure(results: Mapping[str, Any]) -> Any:
    sizes = results["settings"]["sizes"]

    def draw(axes: Axes) -> None:
        for kind, colour, marker in zip(results["kinds"], SERIES, MARKERS, strict=False):
            for model, style in (("recurrent", "-"), ("table", ":")):
                rows = results["kinds"][kind]["oracles"][model]["by pairs"]
                errors = np.log10([rows[str(size)]["advantage"]["error"] for size in sizes])
                label = kind if model == "recurrent" else None
                axes.plot(sizes, 10 ** errors.mean(1), style, color=colour, marker=marker, markersize=3, label=label)
        axes.set(xscale="log", yscale="log")

    return make_figure(draw, "Pairs (solid: recurrent oracle, dotted: table)", "Unexplained share of A", True)
