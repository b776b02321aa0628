"""Failures of the machine, and paths that cannot be, in one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from sepo.errors import one_line

# Errors of the system for an impossible file name; pathlib raises them when testing for existence, too.
_NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
# Messages of libraries when the disk is full; not all of them raise an OSError with an errno.
_FULL_DISK = (
    *("no space left on device", "disk quota exceeded", "database or disk is full"),
    *("pytorchstreamwriter failed", "inline_container.cc"),
)
_LOST_PROCESS = ("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe")


def impossible_path(error: BaseException) -> str | None:
    """Return one line for an impossible path in the input, None for other errors."""
    if isinstance(error, OSError) and error.errno in _NO_PATH:
        return f"'{one_line(error.filename, 100)}' cannot be a path ({error.strerror}): expected a file or folder"
    return None


def known_failure(error: BaseException) -> str | None:
    """Return one line for a failure of the machine, None for other errors.

    Recognises a full disk, exhausted memory and the loss of another process of the launch, whichever exception the
    libraries raise for them.
    """
    for cause in _chain(error):
        text = str(cause).lower()
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or any(phrase in text for phrase in _FULL_DISK):
            temporary = " (that of temporary files: TMPDIR)" if "database or disk is full" in text else ""
            return f"the disk is full{temporary}: free some space, then the same command continues where it stopped"
        if "disk i/o error" in text:  # SQLite, for whatever reason other than a full disk
            return (
                "the disk of temporary files (TMPDIR) cannot be written, perhaps a quota is used up: free some space, "
                "then the same command continues where it stopped"
            )
        if isinstance(cause, MemoryError) or "out of memory" in text:
            return f"out of memory ({one_line(cause, 200)}); lower tokens_per_row, or use lora"
        if isinstance(cause, RuntimeError) and any(phrase in text for phrase in _LOST_PROCESS):
            return "another process of this launch was lost: see its message; the same command continues the run"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
