"""Chat templates: how they are rendered, and what they write around a response, found out by rendering probes.

One rule for what ends a turn, and one date: templates that write today's (Llama 3.x, gpt-oss, SmolLM3) are given a
fixed one, so that the oracle of one day and the scores of the next are of the same prompts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from sepo.errors import UserError, one_line

# The date that Llama 3's own template falls back to.
FIXED_DATE = datetime(2024, 7, 26)
_DATE_CODES = ("%-d", "%-m", *(f"%{letter}" for letter in "aAbBdmyYHMSpjFT"))
# A macro that takes the place of `strftime_now` (Transformers hands no function on to a template).
_FIXED_NOW = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{code}', '{FIXED_DATE.strftime(code)}')" for code in _DATE_CODES)
    + " }}{% endmacro %}"
)
# What opens and closes a model's thinking, by the names that models give it.
THINKING = re.compile(
    r"<(?P<close>/?)(?:think|thinking|thought|reasoning|seed:think)>|\[(?P<close2>/?)THINK\]"
    r"|<\|(?:START|(?P<close3>END))_THINKING\|>|◁(?P<close4>/?)think▷"
)


def closes_thinking(tag: re.Match) -> bool:
    """Does this match of `THINKING` close it?"""
    return any(tag.groups())


def leaves_thinking_open(text: str) -> bool:
    """Does a text end within a model's thinking?"""
    tags = list(THINKING.finditer(text))
    return bool(tags) and not closes_thinking(tags[-1])


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] = (),
    add_generation_prompt: bool = False,
    options: Mapping[str, Any] | None = None,
    in_parts: bool = False,
) -> str:
    """What the tokenizer's chat template makes of a conversation, as text.

    Args:
        tools: schemas of the tools that the conversation may call.
        options: keywords for the template (`enable_thinking`).
        in_parts: give the contents as lists of parts, of which each is one text.

    Raises:
        Exception: whatever the template raises; it is foreign code.
    """
    given = list(tools) or None
    template = tokenizer.get_chat_template(tools=given)
    if "strftime_now" in template:
        # A newline after a block is not written, so one that the template begins with needs another.
        template = _FIXED_NOW + ("\n" if template.startswith("\n") else "") + template
    if in_parts:
        messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
    return str(
        tokenizer.apply_chat_template(
            list(messages),
            tools=given,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **(options or {}),
        )
    )


def any_of(strings: Iterable[str]) -> re.Pattern:
    """A pattern that matches any of these strings, the longest first; without strings it matches nothing."""
    longest_first = sorted({s for s in strings if s}, key=lambda s: (-len(s), s))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")  # (?!) never matches


@dataclass(frozen=True)
class Template:
    """What a chat template writes around the messages it is given.

    Attributes:
        control: matches every control token: the special ones, and the added ones that the template writes.
        own: matches those of them that a model writes within a response: tags of its thinking and of its tool calls.
        turn_end: what it writes after a response.
        kept_end: the part of it that a model generates: up to the token that ends the turn.
        end_token: that token; None if the template closes a turn with none.
        in_parts: it takes the content of a message as a list of parts alone, as models that see do.
    """

    control: re.Pattern
    own: re.Pattern
    turn_end: str
    kept_end: str
    end_token: str | None
    in_parts: bool


def special_tokens(tokenizer: Any) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def _added_tokens(tokenizer: Any) -> set[str]:
    """Tokens added to the vocabulary without being declared special; those of white space are mere text."""
    tokens = tokenizer.added_tokens_decoder.values()
    return {token.content for token in tokens if not token.special and not token.content.isspace()}


def probe_template(tokenizer: Any, options: Mapping[str, Any] | None = None) -> Template | None:
    """Find out what the tokenizer's chat template writes, by rendering two probes; None if it has no template.

    Args:
        options: keywords for the template (`enable_thinking`).

    Raises:
        UserError: the template cannot render a user and an assistant turn, or leaves their content out.
    """
    if not tokenizer.chat_template:
        return None
    question, answer = "Sepo probe question", "Sepo probe answer"
    user = {"role": "user", "content": question}

    failure = "it does not write the messages it is given"
    for in_parts in (False, True):
        try:
            prompt = render(tokenizer, [user], add_generation_prompt=True, options=options, in_parts=in_parts)
            full = render(
                tokenizer, [user, {"role": "assistant", "content": answer}], options=options, in_parts=in_parts
            )
        except Exception as error:  # the template is foreign code
            failure = failure if in_parts else one_line(error)
            continue
        if question in prompt and answer in full:
            break
    else:
        raise UserError(
            f"the tokenizer's chat template cannot render a user and an assistant turn ({failure}): "
            "use another model, or repair the template"
        )
    # Added tokens that are not declared special are structure nevertheless if the template writes them: around any
    # turn, or of their own accord within one (tool calls).
    added = _added_tokens(tokenizer)
    around = {token for token in added if token in prompt.replace(question, "\0")}
    tags = {token for token in added if not token.isalnum() and token in str(tokenizer.chat_template)} - around
    special = special_tokens(tokenizer) | around
    thinking = {token for token in special | added if THINKING.fullmatch(token)}
    control = any_of(special | tags | thinking)
    turn_end = full[full.rindex(answer) + len(answer) :]
    end = _end_of_turn(turn_end, control, tokenizer.eos_token)
    return Template(
        control=control,
        own=any_of(tags | thinking),
        turn_end=turn_end,
        kept_end=turn_end[: end.end()] if end else turn_end.rstrip(),
        end_token=end[0] if end else None,
        in_parts=in_parts,
    )


def _end_of_turn(turn_end: str, control: re.Pattern, eos: str | None) -> re.Match | None:
    """The token that ends a response: the first after it, or the EOS if nothing but control tokens lies between.

    (Phi-3 writes its EOS too, but after a line break that no model generates.)
    """
    first = end = control.search(turn_end)
    while end is not None and end[0] != eos:
        end = control.match(turn_end, end.end())
    return end or first


def end_of_turn_id(tokenizer: Any) -> int | None:
    """The token that the chat template closes a response with, if it does."""
    try:
        template = probe_template(tokenizer)
    except UserError:
        return None
    if template is None or template.end_token is None:
        return None
    return tokenizer.convert_tokens_to_ids(template.end_token)


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token id that ends a response: the model's, the tokenizer's and the chat template's, ascending.

    The chat template matters because many checkpoints name only the end of text as their end-of-sequence token while
    their template closes a turn with another one.
    """
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    end_of_turn = end_of_turn_id(tokenizer)
    if end_of_turn is not None:
        found.add(end_of_turn)
    return sorted(found)
