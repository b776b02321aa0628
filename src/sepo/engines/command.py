"""`sepo work`: a worker for a command with the engine "files"."""

from __future__ import annotations

import argparse
from pathlib import Path

from sepo import command

HELP = "do units of a command that runs with --engine files, on this or another machine, until it has finished"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=command.path,
        metavar="FOLDER",
        help="output_dir or --out of the command, or FOLDER of files:FOLDER",
    )
    parser.add_argument(
        "--wait", type=float, default=600.0, metavar="SECONDS", help="end after so long without work (default 600)"
    )


def run(arguments: argparse.Namespace) -> None:
    command.quiet_libraries()
    from sepo.engines.files import serve
    from sepo.errors import check_number
    from sepo.models.devices import choose_device

    check_number("--wait", arguments.wait, least=0)
    number = serve(Path(arguments.folder), arguments.wait, choose_device("auto").type)
    print(f"{number} units done")
