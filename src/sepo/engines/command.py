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
    from sepo.engines.groups import helping
    from sepo.errors import check_number
    from sepo.models.devices import choose_device
    from sepo.processes import log

    check_number("--wait", arguments.wait, least=0)
    folder, device = Path(arguments.folder), choose_device("auto").type
    if not folder.is_dir():
        log(f"'{folder}' is not there yet: waiting up to {arguments.wait:g} s for work")
    processes = command.join("auto")
    with helping():
        number = processes.on_main(lambda: serve(folder, arguments.wait, device))
    if processes.is_main():
        print(f"{number} units done")
