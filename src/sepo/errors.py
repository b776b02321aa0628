"""Errors that users see without a traceback: bad input, and Ctrl-C.

A `UserError` reports a problem with the input. Its message is one line: what is wrong, where, what was expected and
what to do. The command line prints the message and exits with code 2. The message of an `Interrupted` names the
results that were saved.
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
    """Bad input. The message is one line: what is wrong, where, what was expected and what to do."""


class DoneElsewhere(Exception):
    """Another process has finished the same command. The command line prints the message and exits with code 0."""


class Interrupted(KeyboardInterrupt):
    """Stopped by SIGINT (Ctrl-C) or SIGTERM: `number`. The message names the results that were saved."""

    def __init__(self, kept: str = "", number: int = signal.SIGINT):
        super().__init__(kept)
        self.number = number


@contextlib.contextmanager
def log_kept_on_interrupt(kept: Callable[[], str]) -> Iterator[None]:
    """Add a message to an interruption; of nested contexts the innermost one adds it."""
    try:
        yield
    except KeyboardInterrupt as error:
        if str(error):
            raise
        raise Interrupted(kept(), getattr(error, "number", signal.SIGINT)) from None


def wrong_type(what: str, value: object, expected: str) -> UserError:
    """The error for an argument of a wrong type.

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
    """Raise a UserError unless an argument is a finite number within bounds; `least` and `most` are inclusive.

    >>> check_number("beta", 0, above=0)
    Traceback (most recent call last):
    sepo.errors.UserError: beta is 0: expected a number above 0
    """
    bounds = [(least, "of at least"), (above, "above"), (most, "of at most"), (below, "below")]
    valid = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if valid:
        number = float(value)  # type: ignore[arg-type]
        valid = (
            math.isfinite(number)
            and (least is None or number >= least)
            and (above is None or number > above)
            and (most is None or number <= most)
            and (below is None or number < below)
        )
    if not valid:
        within = " and ".join(f"{words} {bound:g}" for bound, words in bounds if bound is not None)
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{what} is {one_line(repr(value), 60)}: expected {' '.join([kind, within]).strip()}")


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the choice nearest to `word`; an empty string if none is near.

    >>> nearest("chosne", ["chosen", "rejected"])
    " (did you mean 'chosen'?)"
    """
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def one_line(value: object, limit: int = 500) -> str:
    """Fold a text, or the message of an exception, into one printable line of at most `limit` characters.

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


def cannot_write(path: object, error: OSError, instead: str) -> Exception:
    """The error for a path that cannot be written: a UserError, unless the disk is full."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return error
    return UserError(f"cannot write to '{one_line(path, 200)}' ({error.strerror or one_line(error, 100)}): {instead}")
