"""A conversation and two responses -> what the chat template makes of them as text, prompt and responses apart.

The rule: prompt + response is what the template writes of the whole conversation, and everything that it writes before
the response belongs to the prompt. Three things the template may do are dealt with, and counted as notes:

- it writes something between its generation prompt and the response (Qwen 3: an empty block of thinking): prompt;
- its generation prompt opens what the conversation does not hold (R1: a thought): the conversation is followed;
- it leaves a response's thinking out of what it writes (R1): the response is put after the generation prompt.

Whatever else differs, or is not written at all, drops the row. Text from a dataset cannot become structure: control
tokens in it are cut in two by a separator (`Guard`) before the template sees them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sepo.data.messages import DropRow, Message, leaves, map_text
from sepo.data.rows import TextPair
from sepo.data.templates import THINKING, Template, closes_thinking, leaves_thinking_open, render
from sepo.errors import one_line


@dataclass(frozen=True)
class Guard:
    """Cuts every control token typed in a text in two, so that it stays ordinary text.

    Attributes:
        control: matches every control token.
        own: matches those of them that a model writes within a response.
        separator: put between the two parts; no dataset can contain it.
    """

    control: re.Pattern
    own: re.Pattern
    separator: str

    def __call__(self, text: str, *, is_own: bool = False) -> str:
        """
        Args:
            is_own: an assistant's text, in which the tags of its thinking and its tool calls are no mere text.
        """
        pieces, start, position = [], 0, 0
        while match := self.control.search(text, position):
            position = match.start() + 1
            if is_own and self.own.fullmatch(match[0]):
                position = match.end()
                continue
            if len(match[0]) == 1:
                raise DropRow("control token in text")
            pieces.append(text[start:position])
            start = position
        return self.separator.join([*pieces, text[start:]])

    def message(self, message: Message) -> Message:
        """Guard all that a message holds, but for its role."""
        is_own = message["role"] == "assistant"
        return {
            key: value if key == "role" else map_text(value, lambda text: self(text, is_own=is_own))
            for key, value in message.items()
        }


class Written(NamedTuple):
    """A pair as guarded text: `prompt + chosen` is what the chat template writes of the conversation."""

    prompt: str
    chosen: str
    rejected: str
    notes: tuple[str, ...] = ()


class _Response(NamedTuple):
    """What stands before a response, the response up to its end of turn, and a note."""

    before: str
    text: str
    note: str = ""


class _Way(NamedTuple):
    """How a conversation is handed to the template, beside its messages.

    Attributes:
        arguments_as_text: of tool calls, as JSON; some templates (DeepSeek) know no other form.
        empty_as_none: the content of a message that only calls tools; some templates tell calls by it.
    """

    tools: Sequence[Any]
    options: Mapping[str, Any]
    arguments_as_text: bool = False
    empty_as_none: bool = False

    def message(self, message: Message) -> Message:
        if "tool_calls" not in message:
            return message
        calls = message["tool_calls"]
        if self.arguments_as_text:
            functions = [call["function"] for call in calls]
            calls = [
                {**call, "function": {**one, "arguments": json.dumps(one["arguments"], ensure_ascii=False)}}
                for call, one in zip(calls, functions, strict=True)
            ]
        content = None if self.empty_as_none and not message["content"] else message["content"]
        return {**message, "content": content, "tool_calls": calls}


@dataclass
class ChatWriter:
    """Writes conversations with a tokenizer's chat template.

    Attributes:
        template: what probes have shown of the tokenizer's chat template.
        options: keywords for it.
    """

    tokenizer: Any
    template: Template
    guard: Guard
    options: Mapping[str, Any]
    _unwritten: dict[tuple, str | None] = field(default_factory=dict)

    def write(self, pair: TextPair) -> Written:
        """Write one pair.

        Raises:
            DropRow: the template refuses the conversation, leaves a part of it out, or writes two prompts.
        """
        assert not isinstance(pair.prompt, str)
        context = [self.guard.message(message) for message in pair.prompt]
        responses = [
            self.guard.message({"role": "assistant", "content": text, **extra})
            for text, extra in zip((pair.chosen, pair.rejected), pair.extras, strict=True)
        ]
        way = _Way([map_text(tool, self.guard) for tool in pair.tools], {**self.options, **pair.options})
        ways = [way]
        if any("tool_calls" in message for message in (*context, *responses)):
            ways = [
                way._replace(arguments_as_text=as_text, empty_as_none=as_none)
                for as_text in (False, True)
                for as_none in (False, True)
            ]
        first: DropRow | None = None
        for way in ways:
            try:
                return self._write(context, responses, pair.prefill, way)
            except DropRow as drop:
                first = first or drop
        assert first is not None
        raise first

    def opening(self, pair: TextPair) -> str:
        """The prompt alone, up to where a response would begin.

        Raises:
            DropRow: the template refuses the conversation.
        """
        assert not isinstance(pair.prompt, str)
        way = _Way([map_text(tool, self.guard) for tool in pair.tools], {**self.options, **pair.options})
        try:
            return self._render([self.guard.message(one) for one in pair.prompt], way, add_generation_prompt=True)
        except DropRow:
            raise
        except Exception as error:  # templates raise what they like
            raise DropRow("refused by the chat template", one_line(error, 100)) from None

    def _write(self, context: list[Message], responses: list[Message], prefill: bool, way: _Way) -> Written:
        try:
            if prefill:
                opened, begun = None, context[-1]["content"]
            else:
                opened, begun = self._render(context, way, add_generation_prompt=True), ""
            earlier = context[:-1] if prefill else context
            chosen, rejected = (self._response(earlier, begun, opened, one, way) for one in responses)
        except DropRow:
            raise
        except Exception as error:  # the template is foreign code: whatever it raises, it refuses this conversation
            raise DropRow("refused by the chat template", one_line(error)[:100]) from None
        self._check_all_is_written(context, chosen.before, way)
        chosen, rejected = _with_one_prompt(chosen, rejected, self.template.control)
        if not all(_is_in(part, chosen.before) for message in context for part in _parts(message, thinking=False)):
            raise DropRow("two prompts")
        if not chosen.text.strip() or not rejected.text.strip():
            raise DropRow("no response")
        notes = dict.fromkeys(one.note for one in (chosen, rejected) if one.note)
        return Written(chosen.before, chosen.text, rejected.text, tuple(notes))

    def _render(self, messages: Sequence[Message], way: _Way, add_generation_prompt: bool = False) -> str:
        return render(
            self.tokenizer,
            [way.message(message) for message in messages],
            tools=way.tools,
            add_generation_prompt=add_generation_prompt,
            options=way.options,
            in_parts=self.template.in_parts,
        )

    def _response(
        self, context: list[Message], begun: str, opened: str | None, message: Message, way: _Way
    ) -> _Response:
        """Find where a response begins and ends in what the template writes.

        Args:
            begun: what the response goes on with.
            opened: the conversation with the generation prompt; None where `begun` takes its place.
        """
        content = message["content"]
        full = self._render([*context, {**message, "content": begun + content}], way)
        body, end = self._without_end(full, message)
        plain = message.keys() == {"role", "content"}
        for form in dict.fromkeys((content, content.rstrip(), content.lstrip(), content.strip())) if plain else ():
            if form.strip() and body.endswith(form):
                found = _from_its_text(body[: len(body) - len(form)], form + end, opened)
                if not _thinks_twice(found):
                    return found
                apart = self._response(context, begun, opened, _with_thinking_apart(message), way)
                return apart._replace(note=_APART)
        # The template has rewritten the response, or there is more to it than text.
        before = "" if opened is None else _common_start(body, opened, self.template.control)
        if opened is not None and _holds(body[len(before) :], message):
            note = "" if before == opened else _OPENED
            return _Response(before, body[len(before) :] + end, note)
        if opened is None or "tool_calls" in message or not self._knows_thinking(message):
            raise DropRow("left out by the chat template", "a part of the response")
        text = _after(opened, _folded(message))
        if leaves_thinking_open(opened + text):
            raise DropRow("left out by the chat template", "the end of the response's thinking")
        placed = _Response(opened, text + self.template.kept_end, _PLACED)
        if _thinks_twice(placed):  # it was told to write no thought
            raise DropRow("left out by the chat template", "the response's thinking")
        return placed

    def _without_end(self, full: str, message: Message) -> tuple[str, str]:
        """Split what was written into all up to the response's last word, and the end of turn that a model writes."""
        turn_end = self.template.turn_end
        if full.endswith(turn_end):
            return full[: len(full) - len(turn_end)], self.template.kept_end
        # Another end than that of plain text, a tool call's: the control token that is written last.
        ends = list(self.template.control.finditer(full))
        written = [full.rfind(part) + len(part) for part in _parts(message) if part in full]
        if not ends or not written or ends[-1].start() < max(written) or full[ends[-1].end() :].strip():
            raise DropRow("left out by the chat template", "the end of the response")
        return full[: ends[-1].start()], ends[-1][0]

    def _knows_thinking(self, message: Message) -> bool:
        """Is there thinking in the response, and does the model have a way to write it?"""
        if not message.get("reasoning_content") and not THINKING.search(message["content"]):
            return False
        written = str(self.tokenizer.chat_template)
        return THINKING.search(written) is not None or "</think>" in self.tokenizer.get_vocab()

    def _check_all_is_written(self, context: list[Message], prompt: str, way: _Way) -> None:
        """Drop a row of which the template leaves a message, a call or a tool out."""
        for message in context:
            for part in _parts(message, thinking=False):
                if not _is_in(part, prompt):
                    raise DropRow("left out by the chat template", f"{_A[message['role']]} message")
        for tool in way.tools:
            schema = tool.get("function", tool)
            if not all(_is_in(leaf, prompt) for leaf in leaves([schema.get("name"), schema.get("description")])):
                raise DropRow("left out by the chat template", "tools")
        # A short text may stand there by chance: the same conversation with words that nothing else holds.
        kind = tuple((m["role"], bool(m["content"].strip()), len(m.get("tool_calls", ()))) for m in context)
        if kind not in self._unwritten:
            self._unwritten[kind] = self._first_unwritten(context, way)
        if (role := self._unwritten[kind]) is not None:
            raise DropRow("left out by the chat template", f"{_A[role]} message")

    def _first_unwritten(self, context: list[Message], way: _Way) -> str | None:
        """The role of the first message that the template leaves out, whatever it says."""
        marked = [
            {**message, "content": f"sepo{index}probe" if message["content"].strip() else message["content"]}
            for index, message in enumerate(context)
        ]
        try:
            text = self._render(marked, way)
        except Exception:  # it writes the conversation itself, but refuses these words
            return None
        return next((one["role"] for one in marked if one["content"].strip() and one["content"] not in text), None)


_ADDED = "the chat template writes more than its generation prompt before the response: read as part of the prompt"
_OPENED = (
    "the generation prompt of the chat template opens what it does not write of the conversation (thinking?): the "
    "conversation was followed; data.chat_template_kwargs may choose, for example {enable_thinking: false}"
)
_PLACED = "the chat template leaves the response's thinking out: the response was put after the generation prompt"
_APART = "the chat template does not see thinking in a response's text: it was given as the message's reasoning_content"
_A = {"system": "a system", "user": "a user", "assistant": "an assistant", "tool": "a tool"}


def _from_its_text(before: str, text: str, opened: str | None) -> _Response:
    """A response that the template writes as it is: what comes before it is the prompt."""
    if opened is None or before == opened:
        return _Response(before, text)
    if opened.startswith(before) and (before + text).startswith(opened):  # it opens what the response begins with
        return _Response(opened, (before + text)[len(opened) :])
    if before.startswith(opened):
        added = before[len(opened) :]
        if not added.strip():  # white space a model would write itself: with its first word it may be one token
            return _Response(opened, added + text)
        return _Response(before, text, _ADDED)
    return _Response(before, text, _OPENED)


def _thinks_twice(response: _Response) -> bool:
    """Does a thought end right before a response that begins with another? The template did not see that one."""
    tags = list(THINKING.finditer(response.before))
    first = THINKING.match(response.text.lstrip())
    if not tags or first is None or closes_thinking(first):
        return False
    return closes_thinking(tags[-1]) and not response.before[tags[-1].end() :].strip()


def _with_thinking_apart(message: Message) -> Message:
    """The message with the thinking at its beginning in a field of its own."""
    content = message["content"].lstrip()
    first = THINKING.match(content)
    last = next((tag for tag in THINKING.finditer(content) if closes_thinking(tag)), None)
    if first is None or last is None:
        raise DropRow("left out by the chat template", "the end of the response's thinking")
    thought, rest = content[first.end() : last.start()].strip(), content[last.end() :].lstrip("\n")
    return {**message, "content": rest, "reasoning_content": thought}


def _common_start(one: str, other: str, control: re.Pattern) -> str:
    """The text that two texts begin with, up to the end of a control token or a line, or the beginning of a thought."""
    if other.startswith(one):
        return one
    if one.startswith(other):
        return other
    same = next(index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    thoughts = {match.start() for match in THINKING.finditer(one)}
    cuts = {match.end() for match in control.finditer(one) if match.start() not in thoughts}
    cuts |= thoughts | {index + 1 for index, character in enumerate(one) if character == "\n"}
    return one[: max((cut for cut in cuts if cut <= same), default=0)]


def _parts(message: Message, thinking: bool = True) -> list[str]:
    """The texts that must be found of a message: its content between the tags of thinking, and all that it calls.

    Args:
        thinking: what an assistant has thought, too; templates leave earlier thoughts out on purpose.
    """
    content = message["content"]
    if message["role"] == "assistant":
        tags = list(THINKING.finditer(content))
        if not thinking:
            content = content[tags[-1].end() :] if tags else content
            tags = []
        pieces = THINKING.sub("\0", content).split("\0") if tags else [content]
    else:
        pieces = [content]
    pieces = [piece.strip() for piece in pieces if piece.strip()]
    calls = [leaf for call in message.get("tool_calls", ()) for leaf in leaves(call["function"])]
    thought = [message["reasoning_content"].strip()] if thinking and message.get("reasoning_content") else []
    return [*thought, *pieces, *calls]


def _holds(text: str, message: Message) -> bool:
    return all(_is_in(part, text) for part in _parts(message))


def _is_in(part: str, text: str) -> bool:
    """Is a text written there: as it is, as JSON, or with other white space?"""
    if not part or part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text:
        return True
    return "".join(part.split()) in "".join(text.split())


def _folded(message: Message) -> str:
    """The response with its thinking in it, as models write it."""
    thought = message.get("reasoning_content")
    return f"<think>\n{thought.strip()}\n</think>\n\n{message['content'].lstrip()}" if thought else message["content"]


def _after(opened: str, text: str) -> str:
    """What is left of a response to write after a generation prompt that may have opened its thinking."""
    if not leaves_thinking_open(opened):
        return text
    tag = THINKING.match(text.lstrip())
    return text.lstrip()[tag.end() :].lstrip("\n") if tag else text


def _with_one_prompt(chosen: _Response, rejected: _Response, control: re.Pattern) -> tuple[_Response, ...]:
    """Give both responses the prompt that they share; what was written after it goes before each response.

    A response with thinking and one without part there: the template writes an empty thought before the second.
    """
    before = _common_start(chosen.before, rejected.before, control)
    return tuple(_Response(before, one.before[len(before) :] + one.text, one.note) for one in (chosen, rejected))
