"""`sepo report`: the HTML report of a run or of any score table."""

from __future__ import annotations

import argparse
from pathlib import Path

from sepo.command import join, path, quiet_libraries
from sepo.errors import UserError
from sepo.files import check_writable

HELP = "write the HTML report of a run or of a score table"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path, nargs="?", metavar="RUN", help="run folder")
    parser.add_argument("--table", type=path, metavar="DIR", help="a score table instead of a run")
    parser.add_argument("--tokenizer", type=path, metavar="MODEL", help="model whose tokenizer made the table's tokens")
    parser.add_argument(
        "--out",
        type=path,
        metavar="FILE",
        help="HTML file (default: report.html in the run or beside the table; "
        "report-TABLE.html for a table inside a run)",
    )
    parser.add_argument(
        "--figures", type=path, metavar="DIR", help="also save the figures in this folder, as PNG and SVG"
    )
    parser.add_argument("--max-pairs", type=int, default=5000, help="most pairs to show (default 5000)")


def run(arguments: argparse.Namespace) -> None:
    if (arguments.run is None) == (arguments.table is None):
        raise UserError("report needs either a run folder or --table DIR: see `sepo report --help`")
    folder = None if arguments.run is None else Path(arguments.run)
    if folder is not None and not (folder / "manifest.json").is_file():
        raise UserError(f"'{folder}' is not a run folder (no manifest.json): expected a folder that `sepo run` wrote")
    table = None if arguments.table is None else Path(arguments.table)
    tokenizer = None
    if arguments.tokenizer is not None:
        quiet_libraries()
        from sepo.models.names import resolve_model

        tokenizer = Path(resolve_model(arguments.tokenizer))
    from sepo.report import build_report, save_figures

    source = folder or table
    assert source is not None
    out = Path(arguments.out) if arguments.out else _default_out(folder, table)
    if out.is_dir():
        raise UserError(f"'{out}' is a folder: --out names the HTML file")
    if out.suffix.lower() in (".pdf", ".png", ".svg", ".md", ".json"):
        raise UserError(f"'{out}': the report is an HTML file; --figures DIR writes its figures")
    for written in (out.parent, *([Path(arguments.figures)] if arguments.figures else [])):
        check_writable(written)

    def write() -> None:
        print(build_report(folder, table=table, tokenizer=tokenizer, out=out, max_pairs=arguments.max_pairs))
        if arguments.figures:
            for figure in save_figures(source, Path(arguments.figures)):
                print(figure)

    join("cpu").on_main(write)


def _default_out(folder: Path | None, table: Path | None) -> Path:
    """`report.html` in the run or beside the table. A table inside a run does not replace the report of the run."""
    if table is None:
        assert folder is not None
        return folder / "report.html"
    table = table.absolute()
    inside = any((parent / "manifest.json").is_file() for parent in table.parents)
    return table.parent / (f"report-{table.name}.html" if inside else "report.html")
