"""Work in a process of its own that gets a SIGKILL before one of its writes."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


def run_in_child(folder: Path, work: Callable[[], object], kill_at: int | None = None) -> tuple[int, int]:
    """Work in a forked process, which gets a SIGKILL before its `kill_at`-th write to the folder.

    Returns:
        its exit code, negative for a signal, and the number of writes before its end.
    """
    counts = folder.parent / "writes"
    counts.unlink(missing_ok=True)
    pid = os.fork()
    if not pid:
        done, code = 0, 70
        log = os.open(counts, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def hook(event: str, arguments: tuple) -> None:
            nonlocal done
            if _writes(folder, event, arguments):
                if done == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1
                os.write(log, b".")

        try:
            torch.set_num_threads(1)  # threads do not survive a fork
            sys.addaudithook(hook)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), counts.stat().st_size


def _writes(folder: Path, event: str, arguments: tuple) -> bool:
    """Is this an operation that changes the folder?"""
    opens = event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
    return (opens or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")) and str(arguments[0]).startswith(
        str(folder)
    )
