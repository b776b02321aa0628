"""The tags of the thinking that a model writes before its answer."""

from __future__ import annotations

import re

# Tags that open and close thinking, for all known models.
THINKING = re.compile(
    r"<(?P<close>/?)(?:think|thinking|thought|reasoning|seed:think)>|\[(?P<close2>/?)THINK\]"
    r"|<\|(?:START|(?P<close3>END))_THINKING\|>|◁(?P<close4>/?)think▷"
)


def closes_thinking(tag: re.Match) -> bool:
    """Is this match of `THINKING` a closing tag?"""
    return any(tag.groups())


def leaves_thinking_open(text: str) -> bool:
    """Does a text end inside thinking?"""
    tags = list(THINKING.finditer(text))
    return bool(tags) and not closes_thinking(tags[-1])
