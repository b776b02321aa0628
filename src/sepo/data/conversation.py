"""The conversation behind a prompt, kept as JSON text and as a key, before a chat template renders it.

Judges, previews and reports read the stored messages: rendered ids do not tell who wrote a text. Splits and clustered
standard errors group pairs by the key: one question has one key under every template, with any system turn, in any case
and white space, and as the first turn of any dialogue.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from sepo.data.messages import Message
from sepo.errors import UserError, one_line

# Columns of a table of pairs.
CONVERSATION, PROMPT_KEY = "conversation", "prompt_key"


class Conversation(NamedTuple):
    """Messages up to the response, and the schemas of the tools."""

    messages: list[Message]
    tools: list[Any]


def conversation_text(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> str:
    """The JSON text of a conversation: `{"messages": [...]}`, with `tools` if there are any."""
    value = {"messages": list(messages), **({"tools": list(tools)} if tools else {})}
    return json.dumps(value, default=str)


def read_conversation(text: str) -> Conversation:
    """The conversation of `conversation_text`. Raises UserError for another text."""
    try:
        value = json.loads(text)
        messages = [{**message, "content": str(message["content"])} for message in value["messages"]]
        if not messages or not all(isinstance(message["role"], str) for message in messages):
            raise ValueError("no messages")
        return Conversation(messages, list(value.get("tools", ())))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"a row of the column '{CONVERSATION}' is {one_line(text, 60)!r}: expected JSON with messages"
        ) from None


def conversations_of(pairs: pa.Table) -> list[Conversation]:
    """The conversation of each pair. Raises UserError for a table without them."""
    if CONVERSATION not in pairs.column_names:
        raise UserError(
            f"the pairs have no column '{CONVERSATION}', so a judge cannot be asked about them: make the table again "
            "with this release"
        )
    return [read_conversation(text) for text in pairs.column(CONVERSATION).to_pylist()]


def prompt_key(messages: Sequence[Mapping[str, Any]]) -> str:
    """16 hex digits of the first user turn, without differences of case, white space, Unicode form and unseen marks.

    A conversation without a user turn has the key of all its texts.
    """
    texts = [(message["role"], _normalised(message["content"])) for message in messages]
    asked = next((text for role, text in texts if role == "user" and text), None)
    return hashlib.sha256((asked or " ".join(text for _, text in texts)).encode()).hexdigest()[:16]


# Marks that nobody sees: soft hyphens, joiners, direction marks, byte-order marks.
_UNSEEN = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")


def _normalised(text: str) -> str:
    return " ".join(_UNSEEN.sub("", unicodedata.normalize("NFKC", text)).casefold().split())


def in_words(messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation as one text: the words of a single user turn, or all turns under the names of their roles."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role'].capitalize()}: {_said(message)}" for message in messages)


def _said(message: Mapping[str, Any]) -> str:
    calls = [json.dumps(call["function"], default=str) for call in message.get("tool_calls", ())]
    return "\n".join(part for part in (message["content"], *calls) if part)
