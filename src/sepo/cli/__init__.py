"""The `sepo` command: one subcommand a stage, and `run` for all of them.

Heavy libraries are imported by the subcommand that needs them, so that `--help` and a misspelt key answer at once.
A `UserError` ends as one line on standard error and exit code 2.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from sepo.cli.arguments import parse_arguments
from sepo.errors import UserError, impossible_path, known_failure, one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 1 failed, 2 bad input, 130 interrupted)."""
    arguments = parse_arguments(argv)
    try:
        code = arguments.work(arguments) or 0
        _leave()
        return code
    except UserError as error:
        print(f"sepo: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sepo: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if text := impossible_path(error):
            print(f"sepo: {text}", file=sys.stderr)
            return 2
        text = known_failure(error)
        if text is None and (isinstance(error, OSError) or type(error).__module__.startswith("sepo.")):
            text = one_line(error)
        if text is None:
            raise
        print(f"sepo: {text}", file=sys.stderr)
        return 1


def _leave() -> None:
    if "sepo.processes" in sys.modules:
        sys.modules["sepo.processes"].leave()
