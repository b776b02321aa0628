"""The report's figures as files for a paper (PNG, SVG or PDF), and the style of every figure that sepo draws."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sepo.data.ragged import SIDES
from sepo.errors import UserError, wrong_type
from sepo.files import expand_home, write_bytes
from sepo.report.reading import read_scores, read_training

FORMATS = ("png", "svg", "pdf")
# report.css has the same colours.
CHOSEN, REJECTED = "#00756a", "#96307a"
SIDE_COLOURS = {"chosen": CHOSEN, "rejected": REJECTED}
SIDE_LINES = {"chosen": "-", "rejected": (0, (4, 2))}
PLAIN = "#1d5ca8"
GREY = "#5f6168"
# Colours and markers of methods in one figure.
SERIES = (CHOSEN, REJECTED, PLAIN, "#b3541e", GREY, "#7a7a00", "#c0392b", "#2c7fb8", "#4d9221", "#8c6bb1")
MARKERS = "osD^vP*Xhp"
_PERCENT = FuncFormatter(lambda share, _: f"{100 * share:g} %")
_NUMBER = FuncFormatter(lambda value, _: f"{value:g}")


def make_figure(draw: Callable[[Axes], None], x_label: str, y_label: str, legend_beside: bool = False) -> Figure:
    """Make a figure of one panel in the report's style, with a legend if there are several labels.

    `legend_beside` puts the legend beside the panel, where it covers no line.
    """
    figure = Figure(figsize=(4.8, 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e2e2dd", linewidth=0.6)
    axes.set_axisbelow(True)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        if legend_beside:
            figure.legend(loc="outside right upper", frameon=False)
        else:
            axes.legend(frameon=False)
    return figure


def _table_figures(summary: dict) -> dict[str, Figure]:
    """Figures of a score table, by file name."""
    sides = [side for side in SIDES if side in summary["positions"]]

    def cumulative(axes: Axes) -> None:
        curves = summary["cumulative"]
        for side in SIDES:
            if side in curves:
                axes.plot(
                    curves["share"], curves[side], color=SIDE_COLOURS[side], linestyle=SIDE_LINES[side], label=side
                )
        axes.axhline(0.8, color=GREY, linewidth=0.8, linestyle=":")
        axes.axvline(curves["share_for_80"], color=GREY, linewidth=0.8, linestyle=":")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(_PERCENT)
        axes.set(xlim=(0, 1), ylim=(0, 1))

    def distribution(name: str, groups: Sequence[str], log: bool) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            if log:
                axes.set_yscale("log")
            for group in groups:
                colour = SIDE_COLOURS.get(group, PLAIN)
                shares, edges = summary[name][group], summary[name]["edges"]
                axes.stairs(shares, edges, color=colour, linestyle=SIDE_LINES.get(group, "-"), label=group)
                axes.stairs(shares, edges, color=colour, fill=True, alpha=0.12)
            axes.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
            axes.yaxis.set_major_formatter(_PERCENT)

        return draw

    def positions(axes: Axes) -> None:
        at = summary["positions"]["position"]
        for side in sides:
            lines = {
                name: [float("nan") if value is None else value for value in values]
                for name, values in summary["positions"][side].items()
            }
            axes.plot(at, lines["mean"], color=SIDE_COLOURS[side], linestyle=SIDE_LINES[side], label=side)
            axes.fill_between(at, lines["low"], lines["high"], color=SIDE_COLOURS[side], alpha=0.14, linewidth=0)
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(_NUMBER)

    figures = {
        "token-rewards": make_figure(distribution("rewards", sides, True), "Token reward s", "Share of tokens"),
        "reward-by-position": make_figure(positions, "Position in the response", "Mean reward s"),
    }
    if len(sides) > 1:
        margins = make_figure(distribution("margins", ["pairs"], False), "Margin", "Share of pairs")
        figures["pair-margins"] = margins
    if summary["cumulative"]:
        figures["cumulative-share"] = make_figure(cumulative, "Share of tokens, largest |s| first", "Share of Σ|s|")
    return figures


def _training_figures(run: Path) -> dict[str, Figure]:
    figures = {}
    for trained in read_training(run):
        for chart in trained["charts"]:

            def draw(axes: Axes, series: list[dict] = chart["series"]) -> None:
                for line in series:
                    side = line["name"].split(",")[0]
                    style = (0, (1, 1)) if "evaluation" in line["name"] else SIDE_LINES.get(side, "-")
                    colour = SIDE_COLOURS.get(side, "#1b1c20" if side == "evaluation" else PLAIN)
                    marker = "o" if len(line["step"]) < 15 else None
                    axes.plot(
                        line["step"],
                        line["value"],
                        color=colour,
                        linestyle=style,
                        marker=marker,
                        label=line["name"],
                    )

            name = re.sub(r"[^A-Za-z0-9_]+", "-", chart["name"])
            figures[f"{trained['model']}-{name}"] = make_figure(draw, "Step", chart["name"].replace("_", " "))
    return figures


def write_png(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    write_bytes(path, buffer.getvalue())
    return path


def save_figures(
    run: str | os.PathLike, folder: str | os.PathLike, formats: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Draw the figures of a run, or of a score table alone, into files for a paper.

    Args:
        run: a run folder, or a score table (folder or parquet file).
        folder: the folder of the files; created if it is missing.
        formats: any of "png" (300 dots per inch), "svg" and "pdf".

    Returns:
        The files written: `cumulative-share`, `token-rewards`, `reward-by-position`, `pair-margins`, and for
        a run one figure per training curve, such as `oracle-loss`.

    Raises:
        UserError: there is no score table, or a format is not known.
    """
    if not isinstance(formats, list | tuple):
        raise wrong_type("formats", formats, f"a list of {', '.join(FORMATS)}")
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"no figure format '{name}': expected one of {', '.join(FORMATS)}")
    run, folder = Path(expand_home(run, "the run folder")), Path(expand_home(folder, "the folder"))
    is_run = (run / "scores").is_dir()
    scores = read_scores(run / "scores" if is_run else run, max_pairs=1)
    summary = scores.summary()
    written = []
    for name in formats:
        # Each format needs new figures: saving a figure changes its layout.
        figures = _table_figures(summary) | (_training_figures(run) if is_run else {})
        # No date and a fixed salt for element ids: the same numbers give the same file.
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(name)
        for stem, figure in sorted(figures.items()):
            buffer = io.BytesIO()
            with matplotlib.rc_context({"svg.hashsalt": "sepo"}):
                figure.savefig(buffer, format=name, dpi=300, metadata=metadata)
            path = folder / f"{stem}.{name}"
            write_bytes(path, buffer.getvalue())
            written.append(path)
    return written
