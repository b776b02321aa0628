"""The one exception a user is meant to see.

A `UserError` is a problem with the input, not with the program: its message is one line that says
what is wrong, where, what was expected and what to do. The command line prints it without a
traceback and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: one line that says what, where, what was expected and what to do."""


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
