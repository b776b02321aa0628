"""The thinking that a model writes before its answer: the tags of all known models, and the answer without it."""

from __future__ import annotations

import re

# Tags that open and close thinking, for all known models.
THINKING = re.compile(
    r"<(?P<close>/?)(?:think|thinking|thought|reasoning|seed:think)>|\[(?P<close2>/?)THINK\]"
    r"|<\|(?:START|(?P<close3>END))_THINKING\|>|◁(?P<close4>/?)think▷"
)
# gpt-oss writes into channels; its answer is in the channel "final".
_CHANNELS = re.compile(r"\s*(?:<\|start\|>assistant)?<\|channel\|>")
_FINAL = re.compile(r"<\|channel\|>final[^<]*<\|message\|>(.*?)(?:<\|(?:end|return|start)\|>|\Z)", re.DOTALL)
_QUOTES = "`'\"“”‘’"


def closes_thinking(tag: re.Match) -> bool:
    """Is this match of `THINKING` a closing tag?"""
    return any(tag.groups())


def leaves_thinking_open(text: str) -> bool:
    """Does a text end inside thinking?"""
    tags = list(THINKING.finditer(text))
    return bool(tags) and not closes_thinking(tags[-1])


def without_thinking(text: str) -> str | None:
    """The answer in the text of a model; None if the text ends inside the thinking.

    Thinking begins with a tag at the start of a line. Where the prompt already opened it, the text has a closing tag
    alone, and all before that tag is thinking. Tags that a sentence mentions in pairs or in quotes are text.

    >>> without_thinking("<think>A or B?</think> [[B]]"), without_thinking("A or B?</think> [[B]]")
    ('[[B]]', '[[B]]')
    >>> without_thinking("<think>If A were right"), without_thinking("Write <think> and </think> around it.")
    (None, 'Write <think> and </think> around it.')
    """
    if _CHANNELS.match(text):
        final = _FINAL.findall(text)
        return final[-1].strip() if final else None
    kept, start, opened, mentioned = "", 0, False, False
    for tag in THINKING.finditer(text):
        if not closes_thinking(tag):
            if not opened and _starts_line(tag, start):
                kept, opened = kept + text[start : tag.start()], True
            mentioned = not opened
        elif opened:
            start, opened = tag.end(), False
        elif not mentioned and not _is_quoted(tag):
            kept, start = "", tag.end()
        else:
            mentioned = False
    if opened:
        return None
    return (kept + text[start:]).strip() if start else text


def _starts_line(tag: re.Match, start: int) -> bool:
    """Does only blank space precede a tag in its line, after `start`?"""
    place = tag.start()
    while place > start and tag.string[place - 1] in " \t":
        place -= 1
    return place == start or tag.string[place - 1] == "\n"


def _is_quoted(tag: re.Match) -> bool:
    before, after = tag.string[: tag.start()][-1:], tag.string[tag.end() :][:1]
    return bool(before or after) and all(mark and mark in _QUOTES for mark in (before, after))
