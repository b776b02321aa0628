"""Rows of any preference format -> prompt, chosen and rejected as text or messages.

A row that cannot be used raises `DropRow` internally and is counted in the `DataReport` under one of the
`DROP_REASONS`. No row is dropped silently, and bad data never ends in a traceback. Notes count content of rows that the
pairs do not use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from sepo.data.messages import DropRow, Message, Messages, cell_of, check_text, read_cell, read_tools

DROP_REASONS: dict[str, str] = {
    "missing value": "the prompt, the chosen or the rejected response is null",
    "wrong type": "a value is neither text nor a list of messages, or text and messages are mixed",
    "messages as text": "a text looks like a list of messages, but cannot be read as one",
    "unknown role": "a message has a role other than system, user, assistant or tool (under all their known names)",
    "not text": "a message holds an image, a sound or another part that is not text",
    "invalid Unicode": "a text cannot be encoded as UTF-8, for example an unpaired surrogate",
    "no response": "a response is blank, or a conversation does not end with an assistant turn",
    "identical responses": "chosen and rejected are the same",
    "tie": "both responses have the same score, rank or label",
    "unknown label": "the label names neither response",
    "one response": "there are not two responses to one prompt",
    "no shared prompt": "there is no prompt, and chosen and rejected do not share one",
    "several turns": "the assistant turns of a response cannot be found in what the chat template writes",
    "empty prompt": "no message holds a text, or there is no text and neither a BOS nor an EOS token to start from",
    "tools": "the tools are not a list of schemas, or the prompt is not a conversation",
    "refused by the chat template": "the chat template cannot render the conversation",
    "left out by the chat template": "the chat template leaves out a message, a tool call or a part of a response",
    "two prompts": "the chat template writes different prompts before the two responses",
    "control token in text": "a control token typed in the text cannot be distinguished from a real one",
    "identical after truncation": "chosen and rejected differ only beyond the maximum length",
}
# Further columns that a pair may use: name in `columns` -> name in the rows.
EXTRA_COLUMNS = {"system": "prompt_system", "input": "prompt_input", "history": "prompt_history", "tools": "tools"}
TEMPLATE_OPTIONS = "chat_template_kwargs"  # per row, as in TRL
SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
DROP_COLUMN = "drop_reason"  # why `pairing` could not make a pair from a row
READ_COLUMNS = (
    *("prompt", "chosen", "rejected", "pair_id", DROP_COLUMN, TEMPLATE_OPTIONS),
    *EXTRA_COLUMNS.values(),
    *(name for pair in SCORE_COLUMNS for name in pair),
)
ROWS_AT_ONCE = 1000  # rows read and tokenised together: enough to keep the Rust tokenizer busy, little memory
# If both responses begin with a prompt of at least so many characters, they repeat the prompt.
_REPEATED = 20
_NOTHING: Mapping[str, Any] = {}


class TextPair(NamedTuple):
    """One validated preference.

    Attributes:
        prompt: plain text, or the messages before the response (`[{"role": ..., "content": ...}, ...]`).
        chosen: text of the preferred response (for messages: the content of the assistant's last turn).
        rejected: text of the dispreferred response.
        transcript: the messages come from an HH-RLHF transcript. Without a chat template the transcript is used as
            plain text.
        prefill: the prompt ends within the assistant's turn, which the responses continue.
        extras: further fields of the last turns of chosen and rejected: `tool_calls`, `reasoning_content`.
        tools: schemas of the tools that the conversation may call.
        options: keywords for the chat template.
        notes: content of the row that the pair does not use; `DataReport.notes` counts the texts.
        spoken: the messages of a plain-text prompt that holds a system message, too.
        turns: the messages of the chosen and the rejected response, if one has several assistant turns: assistant turns
            with the turns between them. `chosen` and `rejected` then hold the texts of the assistant turns.
    """

    prompt: str | list[Message]
    chosen: str
    rejected: str
    transcript: bool = False
    prefill: bool = False
    extras: tuple[Mapping[str, Any], Mapping[str, Any]] = (_NOTHING, _NOTHING)
    tools: tuple[Any, ...] = ()
    options: Mapping[str, Any] = _NOTHING
    notes: tuple[str, ...] = ()
    spoken: tuple[Message, ...] = ()
    turns: tuple[Sequence[Message], Sequence[Message]] | None = None

    @property
    def messages(self) -> Sequence[Message]:
        """The messages before the response; a plain-text prompt is one user turn."""
        if isinstance(self.prompt, str):
            return self.spoken or ({"role": "user", "content": self.prompt},)
        return self.prompt


@dataclass
class DataReport:
    """Counts of read, dropped and truncated rows of a dataset.

    Attributes:
        rows: rows read.
        kept: pairs in the table.
        dropped: number of dropped rows by reason (a key of `DROP_REASONS`).
        first_dropped: the `pair_id` of the first dropped row by reason.
        details: for some reasons, number of rows by more specific reason: the role, the chat template's message.
        truncated_prompts: pairs whose prompt was cut on the left.
        truncated_responses: responses (not pairs) that were cut on the right and so have no end of turn.
        notes: remarks on ignored or interpreted content -> number of rows.
    """

    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first_dropped: dict[str, int] = field(default_factory=dict)
    details: dict[str, dict[str, int]] = field(default_factory=dict)
    truncated_prompts: int = 0
    truncated_responses: int = 0
    notes: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, pair_id: int, detail: str = "") -> None:
        """Count a dropped row; `reason` is a key of `DROP_REASONS`."""
        if reason not in DROP_REASONS:
            raise KeyError(reason)
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.first_dropped.setdefault(reason, pair_id)
        if detail:
            counts = self.details.setdefault(reason, {})
            detail = detail if detail in counts or len(counts) < _MOST_DETAILS else "other"
            counts[detail] = counts.get(detail, 0) + 1

    def note(self, remark: str, rows: int = 1) -> None:
        """Count rows with a remark."""
        remark = remark if remark in self.notes or len(self.notes) < _MOST_DETAILS else "other remarks"
        self.notes[remark] = self.notes.get(remark, 0) + rows

    def reasons(self) -> str:
        """The drops as text, most frequent first: `no response 3 (first: row 17), ...`."""
        return ", ".join(
            f"{reason}{self._details(reason)} {count:,} (first: row {self.first_dropped[reason]})"
            for reason, count in _by_count(self.dropped)
        )

    def _details(self, reason: str) -> str:
        details = _by_count(self.details.get(reason, {}))
        shown = ", ".join(detail if len(details) == 1 else f"{detail} {count:,}" for detail, count in details[:3])
        return f" [{shown}{', ...' if len(details) > 3 else ''}]" if details else ""

    def remarks(self) -> list[str]:
        """The notes as sentences, most frequent first: `12 rows: the column 'system' is not read`."""
        return [f"{count:,} {'row' if count == 1 else 'rows'}: {remark}" for remark, count in _by_count(self.notes)]

    def summary(self) -> str:
        """The report as text: rows, pairs, drops by reason, truncated rows; then a line for each note."""
        dropped = f"{self.rows - self.kept:,} dropped" + (f": {self.reasons()}" if self.dropped else "")
        first = (
            f"{self.rows:,} rows, {self.kept:,} pairs kept, {dropped}; "
            f"{self.truncated_prompts:,} prompts and {self.truncated_responses:,} responses truncated"
        )
        return "\n    ".join([first, *self.remarks()])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_MOST_DETAILS = 20  # every row of a dataset may have a different one


def _by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


# --- one row --------------------------------------------------------------------------------------------------------

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}
# Separators of turns in Nemotron prompts (HelpSteer2); text before the first one is the user's.
_NEMOTRON_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def normalise_row(row: Mapping[str, Any], *, as_chat: bool = False) -> TextPair:
    """Turn one row of any preference format into a `TextPair`.

    Formats: three texts; two texts with a common beginning (the prompt ends at the last shared white space); three
    message lists; two message lists with common leading messages; a text prompt with message lists that repeat it
    (UltraFeedback-binarized); HH-RLHF transcripts, whole or split into prompt and responses. `messages.py` reads the
    messages.

    >>> normalise_row({"chosen": "The sky is blue.", "rejected": "The sky is green."})[:3]
    ('The sky is', ' blue.', ' green.')

    Args:
        row: values by column name; only `READ_COLUMNS` are used.
        as_chat: wrap a plain-text prompt as one user turn.

    Raises:
        DropRow: the row gives no pair (see `DROP_REASONS`).
    """
    if (reason := row.get(DROP_COLUMN)) is not None:
        name, _, detail = str(reason).partition(": ")
        raise DropRow(name if name in DROP_REASONS else "wrong type", detail)
    row = {name: cell_of(value) for name, value in row.items()}
    chosen, rejected = read_cell(row.get("chosen")), read_cell(row.get("rejected"))
    prompt = read_cell(row.get("prompt"))
    if chosen is None or rejected is None:
        raise DropRow("missing value")
    notes = _score_notes(row)
    if isinstance(chosen, Messages) and isinstance(rejected, Messages):
        pair = _pair_from_messages(prompt, chosen, rejected)
    elif isinstance(chosen, str) and isinstance(rejected, str):
        pair = _pair_from_text(prompt, chosen, rejected, "prompt" in row, as_chat)
    else:
        raise DropRow("wrong type", "text and messages mixed")
    wrapped = (cell.tools for cell in (prompt, chosen, rejected) if isinstance(cell, Messages) and cell.tools)
    pair = with_columns(pair, {**row, "tools": row.get("tools") or next(wrapped, None)})
    if not isinstance(pair.prompt, str) and not any(_has_content(turn["content"], turn) for turn in pair.prompt):
        raise DropRow("empty prompt")
    sides = zip((pair.chosen, pair.rejected), pair.extras, strict=True)
    if not all(_has_content(*side) for side in _assistant_turns(pair) or sides):
        raise DropRow("no response")
    if pair.turns is None and pair.chosen == pair.rejected and pair.extras[0] == pair.extras[1]:
        raise DropRow("identical responses")
    ignored = {name for value in (prompt, chosen, rejected) if isinstance(value, Messages) for name in value.ignored}
    notes += [f"a message's '{check_text(name)[:40]}' is not read" for name in sorted(ignored)]
    return pair._replace(notes=(*pair.notes, *notes))


def _has_content(text: str, extra: Mapping[str, Any]) -> bool:
    return bool(text.strip() or extra.get("tool_calls"))


def _assistant_turns(pair: TextPair) -> list[tuple[str, Mapping[str, Any]]]:
    """Text and further fields of each assistant turn of both responses, if one has several."""
    turns = (turn for side in pair.turns or () for turn in side)
    return [(turn["content"], turn) for turn in turns if turn["role"] == "assistant"]


def _score_notes(row: Mapping[str, Any]) -> list[str]:
    """Drop ties; note rows whose scores contradict their columns."""
    for better, worse in SCORE_COLUMNS:
        high, low = _score(row.get(better)), _score(row.get(worse))
        if high is not None and low is not None:
            if high == low:
                raise DropRow("tie")
            if high < low:
                return [f"'{better}' is lower than '{worse}'; the columns chosen and rejected were used"]
    return []


def _score(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def with_columns(pair: TextPair, row: Mapping[str, Any]) -> TextPair:
    """Add the content of further columns to the prompt: system message, input, history, tools, options."""
    system, given = (_text_cell(row.get(EXTRA_COLUMNS[name])) for name in ("system", "input"))
    history, tools = _history(row.get(EXTRA_COLUMNS["history"])), read_tools(row.get("tools"))
    options = row.get(TEMPLATE_OPTIONS)
    if isinstance(options, Mapping):
        pair = pair._replace(options={key: value for key, value in options.items() if value is not None})
    prompt = pair.prompt
    if isinstance(prompt, str):
        if tools or history:
            raise DropRow("tools" if tools else "wrong type", "" if tools else "a history beside a plain-text prompt")
        if system + given:
            asked = "\n\n".join(part for part in (prompt, given) if part.strip())
            if system.strip():
                spoken = ({"role": "system", "content": system}, {"role": "user", "content": asked})
                return pair._replace(prompt="\n\n".join(part for part in (system, asked) if part), spoken=spoken)
            prompt = asked
        return pair._replace(prompt=prompt)
    if given.strip():
        if prompt[-1]["role"] != "user":
            raise DropRow("wrong type", "an input, but no user turn to add it to")
        prompt = [*prompt[:-1], {**prompt[-1], "content": f"{prompt[-1]['content']}\n\n{given}"}]
    if history:
        at = int(prompt[0]["role"] == "system")
        prompt = [*prompt[:at], *history, *prompt[at:]]
    if system.strip() and prompt[0] != {"role": "system", "content": system}:
        if any(message["role"] == "system" for message in prompt):
            raise DropRow("wrong type", "a system column and another system message")
        prompt = [{"role": "system", "content": system}, *prompt]
    return pair._replace(prompt=prompt, tools=tuple(tools))


def _text_cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DropRow("wrong type")
    return check_text(value)


def _history(value: Any) -> list[Message]:
    """Earlier turns: messages, or pairs of a user's and an assistant's text."""
    if isinstance(value, list | tuple) and value and all(isinstance(turn, list | tuple) for turn in value):
        if not all(len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in value):
            raise DropRow("wrong type", "history")
        return [
            {"role": role, "content": check_text(text)}
            for turn in value
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
    cell = read_cell(value) if value not in (None, "", [], ()) else None
    if isinstance(cell, str) and cell.strip():
        raise DropRow("wrong type", "history")
    return list(cell) if isinstance(cell, Messages) else []


# --- conversations --------------------------------------------------------------------------------------------------


def _pair_from_messages(prompt: str | Messages | None, chosen: list[Message], rejected: list[Message]) -> TextPair:
    for side in (chosen, rejected):
        if not side or side[-1]["role"] != "assistant":
            raise DropRow("no response")
    context = list(prompt) if isinstance(prompt, Messages) else []
    chosen, rejected = (_without_repeated(context, side) for side in (chosen, rejected))
    if chosen[:-1] != rejected[:-1]:
        return _pair_of_turns(prompt, context, chosen, rejected)
    # A prompt column that ends with an assistant turn begins the response (TRL: continue_final_message).
    prefill = bool(context) and context[-1]["role"] == "assistant" and len(chosen) == 1
    context, notes = _whole_context(prompt, context + chosen[:-1])
    extras = tuple({k: v for k, v in side[-1].items() if k not in ("role", "content")} for side in (chosen, rejected))
    return TextPair(
        context,
        chosen[-1]["content"],
        rejected[-1]["content"],
        prefill=prefill,
        extras=(extras[0], extras[1]),
        notes=notes,
    )


def _whole_context(prompt: str | Messages | None, context: list[Message]) -> tuple[list[Message], tuple[str, ...]]:
    """The messages before the response, with a prompt column of text; and a note if it contradicts them."""
    notes: tuple[str, ...] = ()
    if isinstance(prompt, str) and prompt.strip():
        if not any(message["role"] == "user" for message in context):
            context = [*context, {"role": "user", "content": prompt}]
        elif not any(_same_text(prompt, message["content"]) for message in context):
            notes = ("the prompt column differs from the conversations; the conversations were used",)
    if not context:
        raise DropRow("no shared prompt" if prompt is None else "empty prompt")
    return context, notes


def _pair_of_turns(
    prompt: str | Messages | None, context: list[Message], chosen: list[Message], rejected: list[Message]
) -> TextPair:
    """A pair whose responses differ over several assistant turns; the messages that both begin with are the prompt."""
    shorter = min(len(chosen), len(rejected))
    start = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    roles = {side[start]["role"] for side in (chosen, rejected) if start < len(side)}
    if "user" in roles and not isinstance(prompt, Messages) and start < shorter:
        raise DropRow("no shared prompt")
    while start >= 0 and (start == shorter or {chosen[start]["role"], rejected[start]["role"]} != {"assistant"}):
        start -= 1  # the turns of users and tools belong to the response if an equal assistant turn led to them
    if start < 0:
        raise DropRow("no shared prompt")
    if start == 0 and context and context[-1]["role"] == "assistant":
        raise DropRow("several turns", "the prompt ends within an assistant turn")
    context, notes = _whole_context(prompt, context + chosen[:start])
    said = [[turn for turn in side[start:] if turn["role"] == "assistant"] for side in (chosen, rejected)]
    if said[0] == said[1]:
        raise DropRow("identical responses")
    first, second = ("\n\n".join(turn["content"] for turn in side) for side in said)
    return TextPair(context, first, second, notes=notes, turns=(chosen[start:], rejected[start:]))


def _without_repeated(context: list[Message], side: list[Message]) -> list[Message]:
    """Remove messages at the beginning of one side that repeat the end of the prompt, as in some datasets."""
    for count in range(min(len(context), len(side) - 1), 0, -1):
        if context[-count:] == side[:count]:
            return side[count:]
    return side


def _same_text(prompt: str, content: str) -> bool:
    return prompt.strip() in content or (bool(content.strip()) and content.strip() in prompt)


# --- plain text -----------------------------------------------------------------------------------------------------


def _pair_from_text(
    prompt: str | Messages | None, chosen: str, rejected: str, has_prompt_column: bool, as_chat: bool
) -> TextPair:
    if isinstance(prompt, Messages):
        if not prompt:
            raise DropRow("empty prompt")
        return TextPair(list(prompt), chosen, rejected, prefill=prompt[-1]["role"] == "assistant")
    if prompt is None or not prompt.strip():
        if _is_transcript(chosen) and _is_transcript(rejected):
            return _pair_from_transcripts(chosen, rejected)
        if prompt is None and has_prompt_column:
            raise DropRow("missing value")
    elif _is_transcript(prompt, chosen):
        return _pair_from_split_transcript(prompt, chosen, rejected)
    elif _NEMOTRON_TURN.search(prompt):
        return TextPair(_nemotron_turns(prompt), chosen.strip(), rejected.strip(), transcript=True)
    notes: tuple[str, ...] = ()
    if prompt is None:
        prompt, chosen, rejected = _split_shared_prefix(chosen, rejected)
    elif len(prompt.strip()) >= _REPEATED and all(_repeats(prompt, side) for side in (chosen, rejected)):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        notes = ("both responses began with the prompt, which was removed from them",)
    if as_chat:
        if not prompt.strip():
            raise DropRow("empty prompt")
        return TextPair([{"role": "user", "content": prompt}], chosen.strip(), rejected.strip(), notes=notes)
    return TextPair(prompt, chosen, rejected, notes=notes)


def _repeats(prompt: str, response: str) -> bool:
    return response.startswith(prompt) and bool(response[len(prompt) :].strip())


def _split_shared_prefix(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split two texts after their common beginning, at white space, which goes to the responses."""
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


# --- transcripts ----------------------------------------------------------------------------------------------------


def _is_transcript(text: str, response: str = "") -> bool:
    first = _TURN.match(text)
    if first is None or first[1] != "Human":
        return False
    if response:  # `text` is the prompt only: prompt or response opens the assistant's turn
        return text.rstrip().endswith("\n\nAssistant:") or response.startswith(("\n\nAssistant:", text))
    return "\n\nAssistant:" in text


def holds_prompt(response: Any) -> bool:
    """Does a response hold its prompt, as a whole transcript or a conversation that does not begin with the answer?"""
    try:
        cell = read_cell(response)
    except DropRow:
        return True
    if isinstance(cell, Messages):
        return not cell or cell[0]["role"] != "assistant"
    return cell is None or _is_transcript(cell)


def _turns(transcript: str) -> list[Message]:
    """Split an HH-RLHF transcript into messages without surrounding white space.

    >>> _turns("\\n\\nHuman: Hi\\n\\nAssistant: Hello")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    _, *parts = _TURN.split(transcript)
    return [
        {"role": _TRANSCRIPT_ROLES[speaker], "content": text.strip()}
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def _nemotron_turns(prompt: str) -> list[Message]:
    first, *parts = _NEMOTRON_TURN.split(prompt)
    turns = [("User", first), *zip(parts[::2], parts[1::2], strict=True)]
    return [{"role": speaker.lower(), "content": text.strip()} for speaker, text in turns if text.strip()]


def _pair_from_transcripts(chosen: str, rejected: str) -> TextPair:
    return _pair_from_messages(None, _turns(chosen), _turns(rejected))._replace(transcript=True)


def _pair_from_split_transcript(prompt: str, chosen: str, rejected: str) -> TextPair:
    context = _turns(prompt)
    if context[-1] == {"role": "assistant", "content": ""}:  # the turn of the response
        context.pop()
    chosen, rejected = (
        side.removeprefix(prompt).strip().removeprefix("Assistant:").strip() for side in (chosen, rejected)
    )
    return TextPair(context, chosen, rejected, transcript=True)


def transcript_text(messages: Sequence[Message]) -> str:
    speakers = {"user": "Human: ", "assistant": "Assistant: "}
    text = "".join(f"\n\n{speakers.get(message['role'], '')}{message['content']}" for message in messages)
    return text + "\n\nAssistant:"
