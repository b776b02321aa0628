"""The thinking that a model writes before its answer: the tags of all known models, and the answer without it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# Tags that open and close thinking in chat templates.
THINKING = re.compile(
    r"<(?P<close>/?)(?:think|thinking|thought|reasoning|seed:think)>|\[(?P<close2>/?)THINK\]"
    r"|<\|(?:START|(?P<close3>END))_THINKING\|>|◁(?P<close4>/?)think▷"
)
# The same in what models write, in any case and with any prefix: <Think>, <mm:think>, <|think_start|>.
_WRITTEN = re.compile(
    r"<\|?(?:start|begin|(?P<close>end))_(?:of_)?(?:think(?:ing)?|thought|reasoning)\|?>"
    r"|<\|?(?P<close2>/?)(?:[a-z]+[:_]|ant)?(?:think(?:ing)?|thoughts?|reasoning|monologue)\|?\s*>"
    r"|<\|?(?:think(?:ing)?|thought|reasoning)_(?:start|begin|(?P<close3>end))\|?>"
    r"|\[(?P<close4>/?)THINK\]|◁(?P<close5>/?)think▷|<\|inner_prefix\|>|(?P<close6><\|inner_suffix\|>)"
    r"|<\|channel>thought|(?P<close7><channel\|>)|<unused94>thought|(?P<close8><unused95>)",
    re.IGNORECASE,
)
# Marks around the answer, in models that also mark their thinking.
_ANSWER = re.compile(r"<\|(?:START|END)_RESPONSE\|>|<\|(?:begin|end)_of_solution\|>", re.IGNORECASE)
# Thinking by tags that also mark parts of an answer: only where the text begins with them and goes on after them.
_PREFACE = re.compile(
    r"\s*(?:<(?P<name>analysis|scratchpad|reflection|inner_monologue)>|<\|im_start\|>think\b)", re.IGNORECASE
)
# gpt-oss writes into channels; its answer is in the channel "final". Some servers drop the marks of the channels.
_CHANNELS = re.compile(r"\s*(?:<\|start\|>assistant)?<\|channel\|>")
_FINAL = re.compile(
    r"<\|channel\|>final(?:[^<]|<\|constrain\|>)*<\|message\|>(.*?)(?:<\|(?:end|return|start|call)\|>|\Z)", re.DOTALL
)
_UNMARKED = re.compile(r"\s*(?:analysis|commentary)(?:.*assistantfinal(?P<answer>.*)|[A-Z].*)", re.DOTALL)
# Apriel names its answer alone.
_NAMED = re.compile(r".*\[BEGIN FINAL RESPONSE\](.*?)(?:\[END FINAL RESPONSE\].*|\Z)", re.DOTALL)
_OPENING = 32  # last tokens of a prompt, which may open the thinking
_QUOTES = "`'\"“”‘’"
_BLANK = " \t\ufeff\u200b"


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
    if unmarked := _UNMARKED.match(text):
        return None if unmarked["answer"] is None else unmarked["answer"].strip()
    if named := _NAMED.fullmatch(text):
        return named[1].strip()
    if preface := _PREFACE.match(text):
        return _after_preface(text, preface)
    kept, start, opened, mentioned = "", 0, False, False
    for tag in _WRITTEN.finditer(text):
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
    return _ANSWER.sub("", kept + text[start:]).strip() if start else text


def _after_preface(text: str, opening: re.Match) -> str | None:
    """The text after its `_PREFACE`: None if it has no end, the whole text if nothing follows it."""
    close = f"</{opening['name']}>" if opening["name"] else "<|im_start|>answer"
    closing = re.compile(re.escape(close), re.IGNORECASE).search(text, opening.end())
    return None if closing is None else text[closing.end() :].strip() or text


def answer_of(tokenizer: Any, ids: Sequence[int], prompt_ids: Sequence[int]) -> str | None:
    """The answer in generated tokens, without thinking and special tokens; None if the thinking has no end.

    The tags of many models are special tokens, and the prompt may open the thinking (R1), so both are read as tokens.
    """
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    marked = str(tokenizer.decode(list(ids), skip_special_tokens=False))
    before = str(tokenizer.decode(list(prompt_ids[-_OPENING:]), skip_special_tokens=False))
    tag = next((tag for tag in _WRITTEN.finditer(before) if not before[tag.end() :].strip()), None)
    opened = tag is not None and not closes_thinking(tag)
    answer = without_thinking(f"<think>{marked}" if opened else marked)
    if answer is None or answer == marked:
        return text if answer is not None else None
    for token in tokenizer.added_tokens_decoder.values():
        answer = answer.replace(token.content, "") if token.special else answer
    return answer.strip()


def _starts_line(tag: re.Match, start: int) -> bool:
    """Does only blank space precede a tag in its line, after `start`?"""
    place = tag.start()
    while place > start and tag.string[place - 1] in _BLANK:
        place -= 1
    return place == start or tag.string[place - 1] == "\n"


def _is_quoted(tag: re.Match) -> bool:
    before, after = tag.string[: tag.start()][-1:], tag.string[tag.end() :][:1]
    return bool(before or after) and all(mark and mark in _QUOTES for mark in (before, after))
