"""Rows of any preference format -> prompt, chosen and rejected as text or messages.

A row that cannot be used raises `DropRow` inside and is counted in the `DataReport` under one of the fixed
`DROP_REASONS`; nothing is dropped silently, and bad data never ends in a traceback.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

ROLES = frozenset({"system", "user", "assistant", "tool"})
DROP_REASONS: dict[str, str] = {
    "missing value": "the prompt, the chosen or the rejected response is null",
    "wrong type": "a value is neither text nor a list of messages, or text and messages are mixed",
    "unknown role": "a message has a role other than system, user, assistant or tool",
    "invalid Unicode": "a text cannot be encoded as UTF-8, for example an unpaired surrogate",
    "no response": "a response is blank, or a conversation does not end with an assistant turn",
    "identical responses": "chosen and rejected are the same",
    "no shared prompt": "there is no prompt, and chosen and rejected do not share one",
    "empty prompt": "there is no message, or no text and neither a BOS nor an EOS token to start from",
    "refused by the chat template": "the chat template cannot render the conversation",
    "control token in text": "a control token typed in the text cannot be told apart from a real one",
    "identical after truncation": "chosen and rejected differ only beyond the maximum length",
}
Message = dict[str, str]


class DropRow(Exception):
    """A row that gives no pair; `reason` is a key of `DROP_REASONS`. Counted, never shown to the user."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class TextPair(NamedTuple):
    """One validated preference.

    Attributes:
        prompt: plain text, or the messages before the response (`[{"role": ..., "content": ...}, ...]`).
        chosen: text of the preferred response (for messages: the content of the assistant's last turn).
        rejected: text of the dispreferred response.
        transcript: the messages were read from an HH-RLHF transcript, so a model without a chat template
            can be given the transcript as plain text.
    """

    prompt: str | list[Message]
    chosen: str
    rejected: str
    transcript: bool = False


@dataclass
class DataReport:
    """What became of the rows of a dataset.

    Attributes:
        rows: rows read.
        kept: pairs in the table.
        dropped: number of dropped rows by reason (a key of `DROP_REASONS`).
        first_dropped: the `pair_id` of the first row dropped for each reason.
        truncated_prompts: pairs whose prompt was cut on the left.
        truncated_responses: responses (not pairs) that were cut on the right, and so end without an end of
            turn.
    """

    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first_dropped: dict[str, int] = field(default_factory=dict)
    truncated_prompts: int = 0
    truncated_responses: int = 0

    def drop(self, reason: str, pair_id: int) -> None:
        """Count one dropped row; `reason` must be a key of `DROP_REASONS`."""
        if reason not in DROP_REASONS:
            raise KeyError(reason)
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.first_dropped.setdefault(reason, pair_id)

    def reasons(self) -> str:
        """Return the drops in one phrase, most frequent first: `no response 3 (first: row 17), ...`."""
        ordered = sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{reason} {count:,} (first: row {self.first_dropped[reason]})" for reason, count in ordered)

    def summary(self) -> str:
        """Return one line a person can read: rows, kept, dropped by reason, truncated."""
        dropped = f"{self.rows - self.kept:,} dropped" + (f": {self.reasons()}" if self.dropped else "")
        return (
            f"{self.rows:,} rows, {self.kept:,} pairs kept, {dropped}; "
            f"{self.truncated_prompts:,} prompts and {self.truncated_responses:,} responses truncated"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def normalise_row(row: Mapping[str, Any], *, as_chat: bool = False) -> TextPair:
    """Turn one row of any preference format into a `TextPair`.

    Formats: three texts; two texts that share their beginning (the prompt then ends at the last shared
    whitespace); three message lists; two message lists that share their leading messages; a text prompt with
    message lists that repeat it (UltraFeedback-binarized); HH-RLHF transcripts, whole or split in prompt and
    responses. Messages are `{"role", "content"}` or `{"from", "value"}`.

    >>> normalise_row({"chosen": "The sky is blue.", "rejected": "The sky is green."})
    TextPair(prompt='The sky is', chosen=' blue.', rejected=' green.', transcript=False)

    Args:
        row: values by column name; columns other than prompt, chosen and rejected are ignored.
        as_chat: wrap a plain-text prompt as one user turn.

    Raises:
        DropRow: the row gives no pair (see `DROP_REASONS`).
    """
    chosen, rejected = _value(row.get("chosen")), _value(row.get("rejected"))
    prompt = _value(row.get("prompt"))
    if chosen is None or rejected is None:
        raise DropRow("missing value")
    if isinstance(chosen, list) and isinstance(rejected, list):
        pair = _pair_from_messages(prompt, chosen, rejected)
    elif isinstance(chosen, str) and isinstance(rejected, str):
        pair = _pair_from_text(prompt, chosen, rejected, "prompt" in row, as_chat)
    else:
        raise DropRow("wrong type")
    if not pair.chosen.strip() or not pair.rejected.strip():
        raise DropRow("no response")
    if pair.chosen == pair.rejected:
        raise DropRow("identical responses")
    return pair


def _value(value: Any) -> str | list[Message] | None:
    """Check one cell: text, messages or nothing."""
    if isinstance(value, Mapping) and set(value) == {"json"}:  # see `_column`
        try:
            value = json.loads(value["json"])
        except (ValueError, TypeError, RecursionError):
            raise DropRow("wrong type") from None
    if value is None:
        return None
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        value = _unzip(value)
    if not isinstance(value, list | tuple):
        raise DropRow("wrong type")
    return [_message(message) for message in value]


def _unzip(value: Mapping[str, Any]) -> list:
    """One message, or a struct of lists (how older releases of `datasets` store a list of messages)."""
    role, content = value.get("role"), value.get("content")
    if isinstance(role, list) and isinstance(content, list) and len(role) == len(content):
        return [{"role": r, "content": c} for r, c in zip(role, content, strict=True)]
    return [value]


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise DropRow("wrong type")
    role, content = message.get("role"), message.get("content")
    if role is None and content is None:
        role, content = message.get("from"), message.get("value")
        role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str) or not isinstance(content, str):
        raise DropRow("wrong type")
    if role not in ROLES:
        raise DropRow("unknown role")
    return {"role": role, "content": _text(content)}


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DropRow("invalid Unicode") from None
    return str(value)


def _pair_from_messages(prompt: str | list[Message] | None, chosen: list[Message], rejected: list[Message]) -> TextPair:
    for side in (chosen, rejected):
        if not side or side[-1]["role"] != "assistant":
            raise DropRow("no response")
    context = prompt if isinstance(prompt, list) else []
    # Some datasets repeat the prompt's messages in the responses.
    chosen, rejected = (
        side[len(context) :] if len(side) > len(context) and side[: len(context)] == context else side
        for side in (chosen, rejected)
    )
    if chosen[:-1] != rejected[:-1]:
        raise DropRow("no shared prompt")  # a response is one turn; these part earlier
    context = context + chosen[:-1]
    if isinstance(prompt, str) and prompt.strip() and not any(m["role"] == "user" for m in context):
        context = [*context, {"role": "user", "content": prompt}]
    if not context:
        raise DropRow("no shared prompt" if prompt is None else "empty prompt")
    return TextPair(context, chosen[-1]["content"], rejected[-1]["content"])


def _pair_from_text(
    prompt: str | list[Message] | None, chosen: str, rejected: str, has_prompt_column: bool, as_chat: bool
) -> TextPair:
    if isinstance(prompt, list):
        if not prompt:
            raise DropRow("empty prompt")
        return TextPair(prompt, chosen, rejected)
    if prompt is None or not prompt.strip():
        if _is_transcript(chosen) and _is_transcript(rejected):
            return _pair_from_transcripts(chosen, rejected)
        if prompt is None and has_prompt_column:
            raise DropRow("missing value")
    elif _is_transcript(prompt, chosen):
        return _pair_from_split_transcript(prompt, chosen, rejected)
    if prompt is None:
        prompt, chosen, rejected = _split_shared_prefix(chosen, rejected)
    if as_chat:
        if not prompt.strip():
            raise DropRow("empty prompt")
        return TextPair([{"role": "user", "content": prompt}], chosen.strip(), rejected.strip())
    return TextPair(prompt, chosen, rejected)


def _split_shared_prefix(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split two texts after their shared beginning, at whitespace, which goes to the responses."""
    if chosen == rejected:
        raise DropRow("identical responses")
    shorter = min(len(chosen), len(rejected))
    end = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    while end > 0:
        if (
            chosen[end : end + 1].isspace()
            and rejected[end : end + 1].isspace()
            and chosen[end:].strip()
            and rejected[end:].strip()
        ):
            break
        end -= 1
    if not chosen[:end].strip():
        raise DropRow("no shared prompt")
    return chosen[:end], chosen[end:], rejected[end:]


def _is_transcript(text: str, response: str = "") -> bool:
    first = _TURN.match(text)
    if first is None or first[1] != "Human":
        return False
    if response:  # a prompt alone: the assistant's turn is opened by the prompt or by the response
        return text.rstrip().endswith("\n\nAssistant:") or response.startswith(("\n\nAssistant:", text))
    return "\n\nAssistant:" in text


def _turns(transcript: str) -> list[Message]:
    """Split an HH-RLHF transcript into messages; surrounding whitespace is layout, not content.

    >>> _turns("\\n\\nHuman: Hi\\n\\nAssistant: Hello")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    _, *parts = _TURN.split(transcript)
    return [
        {"role": _TRANSCRIPT_ROLES[speaker], "content": text.strip()}
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def _pair_from_transcripts(chosen: str, rejected: str) -> TextPair:
    return _pair_from_messages(None, _turns(chosen), _turns(rejected))._replace(transcript=True)


def _pair_from_split_transcript(prompt: str, chosen: str, rejected: str) -> TextPair:
    context = _turns(prompt)
    if context[-1] == {"role": "assistant", "content": ""}:  # the opened turn
        context.pop()
    chosen, rejected = (
        side.removeprefix(prompt).strip().removeprefix("Assistant:").strip() for side in (chosen, rejected)
    )
    return TextPair(context, chosen, rejected, transcript=True)


def transcript_text(messages: Sequence[Message]) -> str:
    speakers = {"user": "Human", "assistant": "Assistant"}
    text = "".join(f"\n\n{speakers[message['role']]}: {message['content']}" for message in messages)
    return text + "\n\nAssistant:"
