"""Chat templates: rendering, and the text that a template writes around a response, found by rendering probes.

Templates that write today's date (Llama 3.x, gpt-oss, SmolLM3) get a fixed date, so that runs on different days have
the same prompts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from sepo.data.thinking import THINKING
from sepo.errors import UserError, one_line

# The default date of Llama 3's template.
FIXED_DATE = datetime(2024, 7, 26)
_DATE_CODES = ("%-d", "%-m", *(f"%{letter}" for letter in "aAbBdmyYHMSpjFT"))
# A macro that replaces `strftime_now`: Transformers cannot pass a function to a template.
_FIXED_NOW = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{code}', '{FIXED_DATE.strftime(code)}')" for code in _DATE_CODES)
    + " }}{% endmacro %}"
)


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] = (),
    add_generation_prompt: bool = False,
    options: Mapping[str, Any] | None = None,
    in_parts: bool = False,
) -> str:
    """Render a conversation with the tokenizer's chat template.

    Args:
        tools: schemas of the tools that the conversation may call.
        options: keywords for the template (`enable_thinking`).
        in_parts: pass each content as a list with one text part.

    Raises:
        Exception: whatever the template raises; it is foreign code.
    """
    given = list(tools) or None
    template = tokenizer.get_chat_template(tools=given)
    if "strftime_now" in template:
        # Jinja drops the first newline after a block, so a template that begins with a newline needs another.
        template = _FIXED_NOW + ("\n" if template.startswith("\n") else "") + template
    if in_parts:
        messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
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
    """A pattern that matches any of the strings, longest first; without strings it matches nothing."""
    longest_first = sorted({s for s in strings if s}, key=lambda s: (-len(s), s))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")  # (?!) never matches


@dataclass(frozen=True)
class Template:
    """Properties of a chat template.

    Attributes:
        control: matches every control token: special tokens, and added tokens that the template writes.
        in_response: matches control tokens that a model writes within a response: tags of thinking and of tool calls.
        turn_end: text that the template writes after a response.
        kept_end: the part of `turn_end` that a model generates: up to the token that ends the turn.
        end_token: the token that ends a turn; None if the template writes none.
        in_parts: the template accepts contents only as lists of parts, as those of vision models.
    """

    control: re.Pattern
    in_response: re.Pattern
    turn_end: str
    kept_end: str
    end_token: str | None
    in_parts: bool


def special_tokens(tokenizer: Any) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def _added_tokens(tokenizer: Any) -> set[str]:
    """Added tokens that are not special; tokens of white space are ordinary text."""
    tokens = tokenizer.added_tokens_decoder.values()
    return {token.content for token in tokens if not token.special and not token.content.isspace()}


def probe_template(tokenizer: Any, options: Mapping[str, Any] | None = None) -> Template | None:
    """Find the properties of the tokenizer's chat template by rendering two probes; None without a template.

    Args:
        options: keywords for the template (`enable_thinking`).

    Raises:
        UserError: the template cannot render a user and an assistant turn, or leaves out their content.
    """
    if not tokenizer.chat_template:
        return None
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(tokenizer.chat_template)
        raise UserError(
            f"the tokenizer has the chat templates {names} (in additional_chat_templates), "
            "but none by default: save one as chat_template.jinja in the folder of the tokenizer"
        )
    question, answer = "Sepo probe question", "Sepo probe answer"
    user = {"role": "user", "content": question}

    failure = "it leaves out the content of messages"
    for in_parts in (False, True):
        try:
            prompt = render(tokenizer, [user], add_generation_prompt=True, options=options, in_parts=in_parts)
            full = render(
                tokenizer, [user, {"role": "assistant", "content": answer}], options=options, in_parts=in_parts
            )
        except Exception as error:  # a template may raise any exception
            failure = failure if in_parts else one_line(error)
            continue
        if question in prompt and answer in full:
            break
    else:
        raise UserError(
            f"the tokenizer's chat template cannot render a user and an assistant turn ({failure}): "
            "use another model, or repair the template"
        )
    # Added tokens that are not special are control tokens, too, if the template writes them around or within a turn
    # (tool calls).
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
        in_response=any_of(tags | thinking),
        turn_end=turn_end,
        kept_end=turn_end[: end.end()] if end else turn_end.rstrip(),
        end_token=end[0] if end else None,
        in_parts=in_parts,
    )


def _end_of_turn(turn_end: str, control: re.Pattern, eos: str | None) -> re.Match | None:
    """The token that ends a response: the first one after it, or the EOS if only control tokens precede it.

    (Phi-3 also writes its EOS, but after a line break that no model generates.)
    """
    first = end = control.search(turn_end)
    while end is not None and end[0] != eos:
        end = control.match(turn_end, end.end())
    return end or first


def end_of_turn_id(tokenizer: Any) -> int | None:
    """The token with which the chat template ends a response; None if there is none."""
    try:
        template = probe_template(tokenizer)
    except UserError:
        return None
    if template is None or template.end_token is None:
        return None
    return tokenizer.convert_tokens_to_ids(template.end_token)


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token id that ends a response, ascending: from model, tokenizer and chat template.

    Many checkpoints name only the end of text as their end-of-sequence token, but their chat template ends a turn with
    another token.
    """
    stops: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        stops.update([ids] if isinstance(ids, int) else ids or [])
    end_of_turn = end_of_turn_id(tokenizer)
    if end_of_turn is not None:
        stops.add(end_of_turn)
    return sorted(stops)
