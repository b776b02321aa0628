"""The `sepo` command: one subcommand a stage, and `run` for all of them.

Heavy libraries are imported by the subcommand that needs them, so that `--help` and a misspelt key answer at once.
A `UserError` ends as one line on standard error and exit code 2.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from sepo.cli.arguments import parse_arguments
from sepo.cli.failures import impossible_path, known_failure
from sepo.errors import DoneElsewhere, Interrupted, UserError, one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0 done, 1 failed, 2 bad input, 130 interrupted (SIGINT), 143 terminated (SIGTERM).
    """
    for stream in (sys.stdout, sys.stderr):
        # A redirected stream may know a few characters only (ASCII, cp1252): the others are shown as question marks.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    failed = True
    try:
        _require_folder()
        with _terminated_as_interrupted():
            command = parse_arguments(argv)
            code = command.module.run(command.arguments) or 0
        failed = False
        return code
    except UserError as error:
        return _end(2, one_line(error))
    except DoneElsewhere as error:
        failed = False
        return _end(0, one_line(error)) if _is_main() else 0
    except KeyboardInterrupt as error:
        kept = one_line(error) if str(error) else "what was finished is kept; the same command does the rest"
        code = 128 + getattr(error, "number", signal.SIGINT)
        return _end(code, f"interrupted: {kept}") if _is_main() else code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if text := impossible_path(error):
            return _end(2, text)
        text = known_failure(error)
        if text is None and (isinstance(error, OSError) or type(error).__module__.startswith("sepo.")):
            text = one_line(error)
        if text is None:
            _end_bars()
            raise
        return _end(1, text)
    finally:
        _leave(failed)


def _require_folder() -> None:
    """Refuse to start in a folder that was removed: libraries look for it in many places."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError(
            "the folder that this command was started in no longer exists: change into another one, with `cd`"
        ) from None


def _end(code: int, text: str) -> int:
    """Print why the command ends, on a line of its own, and return its exit code."""
    _end_bars()
    print(f"sepo: {text}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, with the word of what is kept, instead of at once and silently.

    Not in a launch of several processes: one that waits for another would not hear it. (A training does, `interrupt`.)
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 and threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Interrupted("", number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# Of modules that are imported only where there is something to wait for or to show.


def _processes() -> Any:
    return sys.modules.get("sepo.processes")


def _is_main() -> bool:
    return _processes() is None or _processes().is_main()


def _end_bars() -> None:
    if "sepo.bars" in sys.modules:
        sys.modules["sepo.bars"].end_bars()


def _leave(failed: bool) -> None:
    if _processes() is not None:
        _processes().leave(failed)
