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
