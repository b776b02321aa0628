"""The analysis and the ranking as Markdown pages and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sepo.analyse.measures import POSITION_BINS
from sepo.data.ragged import SIDES
from sepo.numbers import number, share, with_error
from sepo.report.edges import Measured
from sepo.report.figures import GREY, PLAIN, SIDE_COLOURS, SIDE_LINES, make_figure, write_png


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def analysis_markdown(result: Mapping[str, Any]) -> str:
    """The analysis as a Markdown page; docs/compare.md explains it."""
    lines = [f"# Token rewards of {result['table']}", "", *_overview(result), *_length(result["length"])]
    lines += ["## Position", "", "![](position.png)", ""]
    if "classes" in result:
        lines += _classes(result)
    if "agreement" in result:
        lines += _agreement(result)
    if "fidelity" in result:
        lines += _fidelity(result["fidelity"])
    return "\n".join(lines)


def _overview(result: Mapping[str, Any]) -> list[str]:
    sides, carried = result["overview"], result["concentration"]

    def row(title: str, key: str, form: str) -> tuple[str, ...]:
        return title, *(number(sides[side][key], form) for side in SIDES)

    return [
        *_table(
            ("", *SIDES),
            [
                row("tokens", "tokens", ",d"),
                row("tokens per response", "mean_length", ".1f"),
                row("mean reward s", "mean", "+.4f"),
                row("standard deviation of s", "sd", ".4f"),
                row("mean s of end tokens", "mean_end", "+.4f"),
                ("effective share of tokens", *(share(sides[side]["effective_share"]) for side in SIDES)),
            ],
        ),
        f"{sides['pairs']:,} pairs.",
        "",
        "## How few tokens carry the reward",
        "",
        f"{share(carried['magnitude']['share_for_80'])} of the tokens carry 80 % of Σ\\|s\\|; "
        f"{share(carried['mass']['share_for_80'])} carry 80 % of the reward in favour of the label (paper: 35–40 % "
        "for the reward difference).",
        "",
        "![](share.png)",
        "",
    ]


def _length(length: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            name,
            with_error(length[name]["accuracy"], length[name]["accuracy_se"], ".3f"),
            with_error(length[name]["accuracy_not_longer"], length[name]["accuracy_not_longer_se"], ".3f"),
            " / ".join(number(length[name][f"length_correlation_{side}"], "+.2f") for side in SIDES),
        )
        for name in ("sum", "mean")
    ]
    correlation = "rank correlation with length, chosen / rejected"
    return [
        "## Length",
        "",
        *_table(("reward of a response", "accuracy", "chosen not longer", correlation), rows),
        f"Accuracy of preferring the longer response: {number(length['length_baseline'], '.3f')}. In "
        f"{length['pairs_not_longer']:,} pairs the chosen response is not the longer one.",
        "",
    ]


def _classes(result: Mapping[str, Any]) -> list[str]:
    lines = ["## Token classes", ""]
    for side in SIDES:
        lines += _table(
            (side, "share of tokens", f"share of key tokens (k = {result['k']:g})", "share of Σ\\|s\\|", "mean s"),
            [
                (
                    name,
                    *(share(row[key]) for key in ("share", "key_share", "magnitude_share")),
                    number(row["mean"], "+.4f"),
                )
                for name, row in result["classes"][side].items()
                if row["tokens"]
            ],
        )
    return lines


def _agreement(result: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            f"{row['a']}, {row['b']}",
            number(row["correlation"], ".3f"),
            share(row["same_sign"]),
            share(row["overlap"]),
        )
        for row in result["agreement"]["between"]
    ]
    return [
        "## Agreement between oracles",
        "",
        *_table(("oracles", "correlation of s", "same sign", f"key tokens in common (k = {result['k']:g})"), rows),
        f"Two random selections share {share(result['agreement']['chance'])} of their key tokens.",
        "",
        "![](agreement.png)",
        "",
    ]


def _fidelity(fidelity: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            name,
            with_error(row["auc"], row["auc_se"], ".3f"),
            number(row["auc_unsigned"], ".3f"),
            number(row["correlation"], "+.3f"),
            *(f"{share(row[f'precision_{side}'])} ({number(row[f'lift_{side}'], '.2f')})" for side in SIDES),
        )
        for name, row in fidelity.items()
    ]
    header = (
        "reward",
        "AUC, sign-aware",
        "AUC of \\|s\\|",
        "correlation",
        "precision chosen (lift)",
        "rejected (lift)",
    )
    return [
        "## Fidelity: do the rewards find the words of the gold reward?",
        "",
        *_table(header, rows),
        "![](fidelity.png)",
        "",
    ]


def ranking_markdown(result: Mapping[str, Any]) -> str:
    """A ranking of rules as a Markdown page, best first; docs/selection.md explains it."""
    names = ("auc", "cosine", "weight_right", "weight_wrong", "lift", "mass", "effective")
    titles = (
        "AUC",
        "cosine",
        "weight on right tokens",
        "on wrong tokens",
        "lift",
        "reward kept",
        "effective share of tokens",
    )
    count = len(result["oracles"])
    ranked = ranked_rules(result)

    def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
        shares = ("weight_right", "weight_wrong", "mass", "effective")
        return tuple(
            share(row[name]["mean"])
            if name in shares
            else number(row[name]["mean"], ".2f" if name == "lift" else ".3f")
            for name in names
        )

    def difference(row: Mapping[str, Any], name: str) -> str:
        gap, scale = row[name]["difference"], 100 if name == "weight_right" else 1
        form = "+.1f" if scale == 100 else "+.3f"
        mean, low, high = (number(gap[key] * scale, form) for key in ("mean", "low", "high"))
        return f"{mean} ({low} to {high})"

    oracles = f"{count} oracles" if count > 1 else "one oracle"
    lines = [f"# Rules on {oracles}", ""]
    lines += _table(("rule", *titles), [(rule, *cells(row)) for rule, row in ranked])
    lines += ["![](ranking.png)", ""]
    if count > 1:
        lines += [f"Against *{result['baseline']}*, paired by oracle, with 95 % intervals (Student's t):", ""]
        lines += _table(
            ("rule", "AUC", "cosine", "weight on right tokens, points"),
            [
                (rule, *(difference(row, name) for name in ("auc", "cosine", "weight_right")))
                for rule, row in ranked
                if rule != result["baseline"]
            ],
        )
    return "\n".join(lines)


def ranked_rules(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Rules and their measures, the highest cosine first."""
    return sorted(result["rules"].items(), key=lambda item: np.nan_to_num(-item[1]["cosine"]["mean"], nan=np.inf))


def save_ranking_figure(result: Mapping[str, Any], folder: Path) -> Path:
    """Draw ranking.png: the cosine of each rule, one dot per oracle."""

    def draw(axes: Axes) -> None:
        ranked = ranked_rules(result)
        for at, (_, row) in enumerate(ranked):
            values = row["cosine"]["values"]
            axes.plot(values, [at] * len(values), "o", color=PLAIN, markersize=2.5, alpha=0.5)
            axes.plot([row["cosine"]["mean"]], [at], "|", color=PLAIN, markersize=10)
        axes.axvline(result["rules"][result["baseline"]]["cosine"]["mean"], color=GREY, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(ranked)), [rule for rule, _ in ranked], fontsize=7)
        axes.invert_yaxis()

    figure = make_figure(draw, "Cosine of weights and gold rewards of words", "")
    return write_png(figure, folder / "ranking.png")


def save_analysis_figures(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw share.png, position.png and, if the results have them, agreement.png and fidelity.png."""

    def carried(axes: Axes) -> None:
        for kind, style in (("magnitude", "-"), ("mass", SIDE_LINES["rejected"])):
            for side in SIDE_COLOURS:
                if side in result["concentration"][kind]:
                    label = f"{side}, {'Σ|s|' if kind == 'magnitude' else 'in favour of the label'}"
                    axes.plot(
                        result["concentration"]["share"],
                        result["concentration"][kind][side],
                        color=SIDE_COLOURS[side],
                        linestyle=style,
                        label=label,
                    )
        axes.axhline(0.8, color=GREY, linewidth=0.8, linestyle=":")
        axes.set(xlim=(0, 1), ylim=(0, 1))

    def position(axes: Axes) -> None:
        at = (np.arange(POSITION_BINS) + 0.5) / POSITION_BINS
        for side, colour in SIDE_COLOURS.items():
            means = [np.nan if value is None else value for value in result["position"][side]["mean"]]
            axes.plot(at, means, color=colour, marker="o", markersize=3, label=side)
        axes.axhline(0, color=GREY, linewidth=0.8)

    def changed(axes: Axes) -> None:
        shares = result["agreement"]["changed"]
        axes.barh(range(len(shares)), list(shares.values()), color=PLAIN, height=0.6)
        axes.axvline(1 - result["agreement"]["chance"], color=GREY, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(shares)), list(shares))
        axes.invert_yaxis()

    def fidelities(axes: Axes) -> None:
        rows = result["fidelity"]
        for at, row in enumerate(rows.values()):
            value = row["auc"]
            low, high = Measured(value, row["auc_se"], row["prompts"], share=True).interval or (value, value)
            axes.errorbar([value], [at], xerr=[[value - low], [high - value]], fmt="o", color=PLAIN, capsize=3)
        axes.axvline(0.5, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()

    figures = {
        "share": make_figure(carried, "Share of tokens, largest first", "Share of the reward"),
        "position": make_figure(position, "Place in the response", "Mean reward s"),
    }
    if "agreement" in result and result["agreement"]["chance"] is not None:
        figures["agreement"] = make_figure(changed, "Share of key tokens that the last oracle does not select", "")
    if "fidelity" in result:
        figures["fidelity"] = make_figure(fidelities, "AUC for the words of the gold reward, sign-aware", "")
    return [write_png(figure, folder / f"{stem}.png") for stem, figure in figures.items()]
