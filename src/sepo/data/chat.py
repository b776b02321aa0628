"""A conversation and two responses -> prompt and responses as text, rendered by the chat template.

Prompt + response is the rendering of the whole conversation. All text that the template writes before the response
belongs to the prompt. Three cases are handled and counted as notes:

- The template writes text between its generation prompt and the response (Qwen 3: an empty block of thinking). This
  text becomes part of the prompt.
- The generation prompt opens a part that the conversation does not have (R1: a thought). The rendering of the
  conversation is used.
- The template leaves out the thinking of a response (R1). The response is placed after the generation prompt.

Any other difference, and any text that the template leaves out, drops the row. Text of a dataset cannot become
structure: a separator splits every control token in it (`Guard`) before the template is rendered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sepo.data.messages import DropRow, Message, leaves, map_text
from sepo.data.rows import TextPair
from sepo.data.templates import Template, render
from sepo.data.thinking import THINKING, closes_thinking, leaves_thinking_open
from sepo.errors import one_line


@dataclass(frozen=True)
class Guard:
    """Splits every control token typed in a text, so that it stays ordinary text.

    Attributes:
        control: matches every control token.
        in_response: matches the control tokens that a model writes within a response.
        separator: inserted between the two parts; random, so no dataset contains it.
    """

    control: re.Pattern
    in_response: re.Pattern
    separator: str

    def __call__(self, text: str, *, is_assistant: bool = False) -> str:
        """
        Args:
            is_assistant: in an assistant's text, tags of thinking and tool calls stay control tokens.
        """
        pieces, start, position = [], 0, 0
        while match := self.control.search(text, position):
            position = match.start() + 1
            if is_assistant and self.in_response.fullmatch(match[0]):
                position = match.end()
                continue
            if len(match[0]) == 1:
                raise DropRow("control token in text")
            pieces.append(text[start:position])
            start = position
        return self.separator.join([*pieces, text[start:]])

    def message(self, message: Message) -> Message:
        """Guard all texts of a message except its role."""
        is_assistant = message["role"] == "assistant"
        return {
            key: value if key == "role" else map_text(value, lambda text: self(text, is_assistant=is_assistant))
            for key, value in message.items()
        }


class Written(NamedTuple):
    """A pair as guarded text: `prompt + chosen` is the rendering of the chosen conversation.

    Attributes:
        segments: of each response with several assistant turns, in turn text that the model only reads, and an
            assistant turn; joined they are `chosen` and `rejected`.
    """

    prompt: str
    chosen: str
    rejected: str
    notes: tuple[str, ...] = ()
    segments: tuple[list[str], list[str]] | None = None


class Response(NamedTuple):
    """The text before a response, the response up to its end of turn, and a note."""

    before: str
    text: str
    note: str = ""


class Way(NamedTuple):
    """Arguments of the template, and the form of the messages in it.

    Attributes:
        arguments_as_text: pass arguments of tool calls as JSON text, the only form some templates (DeepSeek) accept.
        empty_as_none: pass None as content of a message with tool calls only; some templates recognise calls by it.
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
                {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
                for call, function in zip(calls, functions, strict=True)
            ]
        content = None if self.empty_as_none and not message["content"] else message["content"]
        return {**message, "content": content, "tool_calls": calls}


@dataclass
class ChatWriter:
    """Renders conversations with a tokenizer's chat template.

    Attributes:
        template: properties of the chat template, found by probing.
        options: keywords for the chat template.
    """

    tokenizer: Any
    template: Template
    guard: Guard
    options: Mapping[str, Any]
    _unwritten: dict[tuple, str | None] = field(default_factory=dict)

    def forget(self) -> None:
        """Test the template again: what one conversation showed is no longer used for the next."""
        self._unwritten.clear()

    def write(self, pair: TextPair) -> Written:
        """Render one pair.

        Raises:
            DropRow: the template rejects the conversation, leaves a part of it out, or writes two prompts.
        """
        assert not isinstance(pair.prompt, str)
        context = [self.guard.message(message) for message in pair.prompt]
        sides: Sequence[Sequence[Message]] = pair.turns or [
            [{"role": "assistant", "content": text, **extra}]
            for text, extra in zip((pair.chosen, pair.rejected), pair.extras, strict=True)
        ]
        chosen, rejected = ([self.guard.message(message) for message in side] for side in sides)
        way = Way([map_text(tool, self.guard) for tool in pair.tools], {**self.options, **pair.options})
        ways = [way]
        if any("tool_calls" in message for message in (*context, *chosen, *rejected)):
            ways = [
                way._replace(arguments_as_text=as_text, empty_as_none=as_none)
                for as_text in (False, True)
                for as_none in (False, True)
            ]
        first: DropRow | None = None
        for way in ways:
            try:
                if pair.turns is None:
                    return self._write(context, [*chosen, *rejected], pair.prefill, way)
                from sepo.data.turns import write_turns

                return write_turns(self, context, (chosen, rejected), way)
            except DropRow as drop:
                first = first or drop
        assert first is not None
        raise first

    def opening(self, pair: TextPair) -> str:
        """Render the prompt with the generation prompt.

        Raises:
            DropRow: the template rejects the conversation, or leaves a part of it out.
        """
        assert not isinstance(pair.prompt, str)
        way = Way([map_text(tool, self.guard) for tool in pair.tools], {**self.options, **pair.options})
        try:
            messages = [self.guard.message(message) for message in pair.prompt]
            text = self.render(messages, way, add_generation_prompt=True)
            self.check_all_is_written(messages, text, way)
            if text == self.render(messages, way):  # the template has no generation prompt, or writes it always
                return self.response(messages, "", text, {"role": "assistant", "content": "Sepo"}, way).before
            return text
        except DropRow:
            raise
        except Exception as error:  # a template may raise any exception
            raise DropRow("refused by the chat template", one_line(error, 100)) from None

    def _write(self, context: list[Message], responses: list[Message], prefill: bool, way: Way) -> Written:
        try:
            if prefill:
                opened, begun = None, context[-1]["content"]
            else:
                opened, begun = self.render(context, way, add_generation_prompt=True), ""
            earlier = context[:-1] if prefill else context
            chosen, rejected = (self.response(earlier, begun, opened, response, way) for response in responses)
        except DropRow:
            raise
        except Exception as error:  # a template may raise any exception
            raise DropRow("refused by the chat template", one_line(error)[:100]) from None
        self.check_all_is_written(context, chosen.before, way)
        chosen, rejected = _with_one_prompt(chosen, rejected, self.template.control)
        if not all(is_in(part, chosen.before) for message in context for part in parts(message, thinking=False)):
            raise DropRow("two prompts")
        if not chosen.text.strip() or not rejected.text.strip():
            raise DropRow("no response")
        notes = dict.fromkeys(response.note for response in (chosen, rejected) if response.note)
        return Written(chosen.before, chosen.text, rejected.text, tuple(notes))

    def render(self, messages: Sequence[Message], way: Way, add_generation_prompt: bool = False) -> str:
        return render(
            self.tokenizer,
            [way.message(message) for message in messages],
            tools=way.tools,
            add_generation_prompt=add_generation_prompt,
            options=way.options,
            in_parts=self.template.in_parts,
        )

    def response(self, context: list[Message], begun: str, opened: str | None, message: Message, way: Way) -> Response:
        """Find the beginning and end of a response in the rendered conversation.

        Args:
            begun: beginning of the assistant's turn (prefill), which the response continues.
            opened: the rendered context with the generation prompt; None with a prefill.
        """
        content = message["content"]
        full = self.render([*context, {**message, "content": begun + content}], way)
        body, end = self._without_end(full, message)
        plain = message.keys() == {"role", "content"}
        for form in dict.fromkeys((content, content.rstrip(), content.lstrip(), content.strip())) if plain else ():
            if form.strip() and body.endswith(form):
                response = _from_its_text(body[: len(body) - len(form)], form + end, opened)
                if not _thinks_twice(response):
                    return response
                response = self.response(context, begun, opened, _with_separate_thinking(message), way)
                return response._replace(note=_SEPARATE)
        # The template has rewritten the response, or the response has more than text.
        before = "" if opened is None else common_start(body, opened, self.template.control)
        if opened is not None and _holds(body[len(before) :], message):
            note = "" if before == opened else _OPENED
            return Response(before, body[len(before) :] + end, note)
        if opened is None or "tool_calls" in message or not self._knows_thinking(message):
            raise DropRow("left out by the chat template", "a part of the response")
        text = _after(opened, _folded(message))
        if leaves_thinking_open(opened + text):
            raise DropRow("left out by the chat template", "the end of the response's thinking")
        placed = Response(opened, text + self.template.kept_end, _PLACED)
        if _thinks_twice(placed):  # the options of the template exclude thinking
            raise DropRow("left out by the chat template", "the response's thinking")
        return placed

    def _without_end(self, full: str, message: Message) -> tuple[str, str]:
        """Split a rendered conversation after the response's text; returns the start and the end-of-turn token."""
        turn_end = self.template.turn_end
        if full.endswith(turn_end):
            return full[: len(full) - len(turn_end)], self.template.kept_end
        # Not the end of plain text, but of a tool call: the last control token.
        ends = list(self.template.control.finditer(full))
        written = [full.rfind(part) + len(part) for part in parts(message) if part in full]
        if not ends or not written or ends[-1].start() < max(written) or full[ends[-1].end() :].strip():
            raise DropRow("left out by the chat template", "the end of the response")
        return full[: ends[-1].start()], ends[-1][0]

    def _knows_thinking(self, message: Message) -> bool:
        """Does the response hold thinking, and do template or vocabulary have tags for it?"""
        if not message.get("reasoning_content") and not THINKING.search(message["content"]):
            return False
        written = str(self.tokenizer.chat_template)
        return THINKING.search(written) is not None or "</think>" in self.tokenizer.get_vocab()

    def check_all_is_written(self, context: list[Message], prompt: str, way: Way) -> None:
        """Drop a row if the template leaves out a message, a tool call or a tool."""
        for message in context:
            for part in parts(message, thinking=False):
                if not is_in(part, prompt):
                    raise DropRow("left out by the chat template", f"{_A[message['role']]} message")
        for tool in way.tools:
            schema = tool.get("function", tool)
            if not all(is_in(leaf, prompt) for leaf in leaves([schema.get("name"), schema.get("description")])):
                raise DropRow("left out by the chat template", "tools")
        # A short text may occur by chance, so the same conversation is rendered with unique words, too.
        kind = tuple((m["role"], bool(m["content"].strip()), len(m.get("tool_calls", ()))) for m in context)
        if kind not in self._unwritten:
            self._unwritten[kind] = self._first_unwritten(context, way)
        if (role := self._unwritten[kind]) is not None:
            raise DropRow("left out by the chat template", f"{_A[role]} message")

    def _first_unwritten(self, context: list[Message], way: Way) -> str | None:
        """The role of the first message that the template leaves out, tested with unique words as contents."""
        marked = [
            {**message, "content": f"sepo{index}probe" if message["content"].strip() else message["content"]}
            for index, message in enumerate(context)
        ]
        try:
            text = self.render(marked, way)
        except Exception:  # the template renders the conversation, but rejects these words
            return None
        missing = (m["role"] for m in marked if m["content"].strip() and m["content"] not in text)
        return next(missing, None)


_ADDED = "the chat template writes text between its generation prompt and the response: it became part of the prompt"
_OPENED = (
    "the generation prompt of the chat template opens a part that the conversation does not have (thinking?): the "
    "rendered conversation was used; data.chat_template_kwargs can change this, for example {enable_thinking: false}"
)
_PLACED = "the chat template leaves out the response's thinking: the response was placed after the generation prompt"
_SEPARATE = "the chat template ignores thinking in a response's text: it was passed as the message's reasoning_content"
_A = {"system": "a system", "user": "a user", "assistant": "an assistant", "tool": "a tool"}


def _from_its_text(before: str, text: str, opened: str | None) -> Response:
    """A response that the template writes unchanged: the text before it is the prompt."""
    if opened is None or before == opened:
        return Response(before, text)
    if opened.startswith(before) and (before + text).startswith(opened):  # it opens with the start of the response
        return Response(opened, (before + text)[len(opened) :])
    if before.startswith(opened):
        added = before[len(opened) :]
        if not added.strip():  # the model writes white space itself: it may share a token with the first word
            return Response(opened, added + text)
        return Response(before, text, _ADDED)
    return Response(before, text, _OPENED)


def _thinks_twice(response: Response) -> bool:
    """Does a thought end right before a response that begins with a thought, which the template ignored?"""
    tags = list(THINKING.finditer(response.before))
    first = THINKING.match(response.text.lstrip())
    if not tags or first is None or closes_thinking(first):
        return False
    return closes_thinking(tags[-1]) and not response.before[tags[-1].end() :].strip()


def _with_separate_thinking(message: Message) -> Message:
    """Move the thinking at the beginning of a message's content to `reasoning_content`."""
    content = message["content"].lstrip()
    first = THINKING.match(content)
    last = next((tag for tag in THINKING.finditer(content) if closes_thinking(tag)), None)
    if first is None or last is None:
        raise DropRow("left out by the chat template", "the end of the response's thinking")
    thought, rest = content[first.end() : last.start()].strip(), content[last.end() :].lstrip("\n")
    return {**message, "content": rest, "reasoning_content": thought}


def common_start(a: str, b: str, control: re.Pattern) -> str:
    """The common start of two texts, up to the end of a control token or a line, or the beginning of a thought."""
    if b.startswith(a):
        return a
    if a.startswith(b):
        return b
    same = next(index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    thoughts = {match.start() for match in THINKING.finditer(a)}
    cuts = {match.end() for match in control.finditer(a) if match.start() not in thoughts}
    cuts |= thoughts | {index + 1 for index, character in enumerate(a) if character == "\n"}
    return a[: max((cut for cut in cuts if cut <= same), default=0)]


def parts(message: Message, thinking: bool = True) -> list[str]:
    """The texts of a message that the template must write: content between the tags of thinking, and tool calls.

    Args:
        thinking: include the assistant's thinking; templates leave out earlier thinking on purpose.
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
    return all(is_in(part, text) for part in parts(message))


def is_in(part: str, text: str) -> bool:
    """Does a text hold a part, literally, as JSON, or with other white space?"""
    if not part or part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text:
        return True
    return "".join(part.split()) in "".join(text.split())


def _folded(message: Message) -> str:
    """The response with its thinking inside the text, as models write it."""
    thought = message.get("reasoning_content")
    return f"<think>\n{thought.strip()}\n</think>\n\n{message['content'].lstrip()}" if thought else message["content"]


def _after(opened: str, text: str) -> str:
    """The rest of a response after a generation prompt, which may have opened the thinking already."""
    if not leaves_thinking_open(opened):
        return text
    tag = THINKING.match(text.lstrip())
    return text.lstrip()[tag.end() :].lstrip("\n") if tag else text


def _with_one_prompt(chosen: Response, rejected: Response, control: re.Pattern) -> tuple[Response, ...]:
    """Move text that differs between the two prompts into the responses.

    The prompts differ if only one response has thinking: the template writes an empty thought before the other one.
    """
    before = common_start(chosen.before, rejected.before, control)
    return tuple(Response(before, r.before[len(before) :] + r.text, r.note) for r in (chosen, rejected))
