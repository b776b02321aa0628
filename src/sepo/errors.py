"""What a user is meant to see when something ends early: bad input, and Ctrl-C.

A `UserError` is a problem with the input, not with the program: its message is one line that says
what is wrong, where, what was expected and what to do. The command line prints it without a
traceback and exits with code 2. An `Interrupted` says what is kept.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import math
import signal
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral, Real


class UserError(Exception):
    """Bad input: one line that says what, where, what was expected and what to do."""


class Interrupted(KeyboardInterrupt):
    """Stopped by SIGINT (Ctrl-C) or SIGTERM; the message says what is kept, `number` which signal it was."""

    def __init__(self, kept: str = "", number: int = signal.SIGINT):
        super().__init__(kept)
        self.number = number


@contextlib.contextmanager
def log_kept_on_interrupt(kept: Callable[[], str]) -> Iterator[None]:
    """Give an interruption a message of what is kept; of several around each other the innermost has the word."""
    try:
        yield
    except KeyboardInterrupt as error:
        if str(error):
            raise
        raise Interrupted(kept(), getattr(error, "number", signal.SIGINT)) from None


def wrong_type(what: str, value: object, expected: str) -> UserError:
    """What to raise for an argument of a wrong type.

    >>> wrong_type("the recipe", {}, "a Recipe: load_recipe reads one")
    UserError('the recipe is of type dict: expected a Recipe: load_recipe reads one')
    """
    return UserError(f"{what} is of type {type(value).__name__}: expected {expected}")


def check_number(
    what: str,
    value: object,
    *,
    whole: bool = False,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Raise a UserError unless an argument is a number within bounds (of which `least` and `most` are themselves good).

    >>> check_number("beta", 0, above=0)
    Traceback (most recent call last):
    sepo.errors.UserError: beta is 0: expected a number above 0
    """
    bounds = [(least, "of at least"), (above, "above"), (most, "of at most"), (below, "below")]
    good = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if good:
        number = float(value)  # type: ignore[arg-type]
        good = (
            math.isfinite(number)
            and (least is None or number >= least)
            and (above is None or number > above)
            and (most is None or number <= most)
            and (below is None or number < below)
        )
    if not good:
        within = " and ".join(f"{words} {bound:g}" for bound, words in bounds if bound is not None)
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{what} is {one_line(repr(value), 60)}: expected {' '.join([kind, within]).strip()}")


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the choice nearest to `word`, or an empty string.

    >>> nearest("chosne", ["chosen", "rejected"])
    " (did you mean 'chosen'?)"
    """
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def one_line(value: object, limit: int = 500) -> str:
    """Fold a message (or an exception's) into one printable line of at most `limit` characters.

    >>> one_line("a\\n  b\\x1b[31m")
    'a b [31m'
    """
    text = " ".join(str(value).split()) or type(value).__name__
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def named_error(error: BaseException) -> str:
    """The class and the message of an exception in one line of at most 200 characters.

    >>> named_error(ValueError("no\\n  such thing"))
    'ValueError: no such thing'
    """
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


# What libraries say when the disk is full: only some of them raise an OSError with its number.
_FULL_DISK = ("no space left on device", "disk quota exceeded", "pytorchstreamwriter failed", "inline_container.cc")
_LOST_PROCESS = ("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe")


def known_failure(error: BaseException) -> str | None:
    """Return one line for a failure of the machine rather than of the program (None: it is not one of these).

    Known are a full disk, memory that ran out, and the loss of another process of the launch, in whichever exception
    of whichever library they come.
    """
    for cause in _chain(error):
        text = str(cause).lower()
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or any(phrase in text for phrase in _FULL_DISK):
            return "the disk is full: free some space, then the same command continues where it stopped"
        if isinstance(cause, MemoryError) or "out of memory" in text:
            return f"out of memory ({one_line(cause, 200)}); lower tokens_per_row, or use lora"
        if isinstance(cause, RuntimeError) and any(phrase in text for phrase in _LOST_PROCESS):
            return "another process of this launch was lost: see its message; the same command continues"
    return None


def cannot_write(path: object, error: OSError, instead: str) -> Exception:
    """What to raise for a place that cannot be written to: bad input, unless the disk is full (`known_failure`)."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return error
    return UserError(f"cannot write to '{one_line(path, 200)}' ({error.strerror or one_line(error, 100)}): {instead}")


# What a system says to a name that no file can have; pathlib's tests for existence raise it too.
_NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)


def impossible_path(error: BaseException) -> str | None:
    """Return one line for a path in the input that no file can have (None: the error is another)."""
    if isinstance(error, OSError) and error.errno in _NO_PATH:
        return f"'{one_line(error.filename, 100)}' cannot be a path ({error.strerror}): expected a file or folder"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
