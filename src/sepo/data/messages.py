"""Messages in every notation -> `[{"role": ..., "content": ...}, ...]`.

A conversation may be a list of messages, the JSON, Python or numpy text of such a list (csv files and some parquet
columns), one message, a struct of lists, or wrapped in `{"messages": ...}`. The same conversation gives the same
messages in all notations. A cell that cannot be read raises `DropRow`. `Messages.ignored` names the fields that are not
used. Tool calls and thinking stay in their message, for the chat template.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Message = dict[str, Any]

# Names of roles in datasets -> roles.
ROLES: dict[str, str] = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
}
_THINKING = ("reasoning_content", "reasoning", "thinking")
# Fields of a message and columns of a question that hold something else than text.
NOT_TEXT = ("images", "image", "image_url", "audio", "audios", "video", "videos", "files", "documents")
# Keys that wrap a list of messages.
_WRAPPERS = ("messages", "conversation", "conversations", "turns")
_SYSTEM = ("system", "system_prompt")


class DropRow(Exception):
    """A row that gives no pair. `reason` is a key of `rows.DROP_REASONS`, `detail` a more specific reason.

    Drops are counted; users never see the exception.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class Messages(list):
    """A list of messages; `ignored` names the non-empty fields that are not used, `tools` are those of a wrapper."""

    def __init__(self, messages: Sequence[Message] = (), ignored: Sequence[str] = (), tools: Any = None):
        super().__init__(messages)
        self.ignored, self.tools = tuple(ignored), tools


def read_cell(value: Any) -> str | Messages | None:
    """Read one cell of a row: plain text, messages in any notation, or None.

    >>> read_cell("[{'role': 'user', 'content': 'Hi'}]")
    [{'role': 'user', 'content': 'Hi'}]
    >>> read_cell('{"from": "gpt", "value": "Hello"}')
    [{'role': 'assistant', 'content': 'Hello'}]

    Raises:
        DropRow: the cell is none of these.
    """
    value = cell_of(value)
    if value is None:
        return None
    if isinstance(value, str):
        text = check_text(value)
        parsed = parse_messages(text)
        return text if parsed is None else _messages(parsed)
    value = _as_list(value)
    if isinstance(value, Mapping):
        value = _unwrapped(value)
    if not isinstance(value, list | tuple):
        raise DropRow("wrong type")
    return _messages(value)


def cell_of(value: Any) -> Any:
    """The value of a cell; `formats.column_of` wraps those of a column of several types as JSON."""
    if not isinstance(value, Mapping) or set(value) != {"json"}:
        return value
    try:
        return json.loads(value["json"])
    except (ValueError, TypeError, RecursionError):
        raise DropRow("wrong type") from None


def check_text(value: str) -> str:
    """Return the text; drop the row if it is not valid Unicode."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DropRow("invalid Unicode") from None
    return str(value)


# --- messages as text -----------------------------------------------------------------------------------------------

# The beginning of a list of messages, or of one message, in the notation of JSON, Python or numpy.
_LIKE_MESSAGES = re.compile(
    r"""\s*(?:array\()?\s*\[?\s*(?:array\()?\s*\{[^{}]{0,2000}?["'](?:role|from|content|value|messages|conversations?)["']\s*:"""
)
_LIKE_JSON_TEXT = re.compile(r'\s*"\s*[\[{]')


def parse_messages(text: str) -> Any | None:
    """Parse a text that holds a list of messages, one message or wrapped messages; None for other texts.

    Raises:
        DropRow: the text begins and ends like messages, but cannot be parsed.
    """
    if _LIKE_JSON_TEXT.match(text) and text.rstrip().endswith('"'):  # encoded twice
        try:
            inner = json.loads(text)
        except (ValueError, RecursionError):
            return None
        return parse_messages(inner) if isinstance(inner, str) else None
    if not _LIKE_MESSAGES.match(text):
        return None
    stripped = text.strip()
    whole = stripped.endswith(("]", "}", "dtype=object)"))
    parsers: tuple[Callable[[str], Any], ...] = (json.loads, ast.literal_eval, _numpy_literal)  # none runs code
    for parse in parsers:
        try:
            value = parse(stripped)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        value = _unwrapped(value) if isinstance(value, Mapping) else value
        return value if _are_messages(value) else None
    if whole:
        raise DropRow("messages as text")
    return None


def _are_messages(value: Any) -> bool:
    """Is this a list of mappings with a role and content each? A single mapping needs a known role."""
    if not isinstance(value, list) or not value or not all(isinstance(message, Mapping) for message in value):
        return False
    speakers = [message.get("role", message.get("from")) for message in value]
    said = [bool({"content", "value", "tool_calls", "function_call"} & message.keys()) for message in value]
    if not all(said) or not all(isinstance(speaker, str) for speaker in speakers):
        return False
    return len(value) > 1 or speakers[0].strip().lower() in ROLES


def _numpy_literal(text: str) -> Any:
    """Parse the printed form of a numpy array of dicts: no commas between them, perhaps inside `array(...)`."""
    text = re.sub(r"\barray\(\s*(?=[\[{])", "", text)
    text = re.sub(r",\s*dtype=object\)", "", text)
    pieces: list[str] = []
    quote = ""
    index = 0
    while index < len(text):
        character = text[index]
        pieces.append(character)
        if quote:
            if character == "\\":
                pieces.append(text[index + 1 : index + 2])
                index += 1
            elif character == quote:
                quote = ""
        elif character in "\"'":
            quote = character
        elif character == "}" and re.match(r"\s*\{", text[index + 1 :]):
            pieces.append(",")
        index += 1
    return ast.literal_eval("".join(pieces))


def _unwrapped(value: Mapping[str, Any]) -> Any:
    """The messages of a wrapper with its system message and its tools, of a struct of lists (older releases of
    `datasets`), or one message as a list.
    """
    for name in _WRAPPERS:
        inner = value.get(name)
        if isinstance(inner, list | tuple | np.ndarray) and len(inner):
            if unread := next((name for name in NOT_TEXT if not _is_empty(value.get(name))), None):
                raise DropRow("not text", unread)
            system = next((text for key in _SYSTEM if isinstance(text := value.get(key), str) and text.strip()), None)
            begun = [] if system is None else [{"role": "system", "content": system}]
            return Messages([*begun, *inner], tools=value.get("tools") or value.get("functions"))
    role, content = value.get("role"), value.get("content")
    if isinstance(role, list) and isinstance(content, list) and len(role) == len(content):
        return [{"role": r, "content": c} for r, c in zip(role, content, strict=True)]
    return [value]


# --- one message ----------------------------------------------------------------------------------------------------


def _messages(values: Sequence[Any]) -> Messages:
    messages, ignored = [], []
    for value in values:
        message, unused = _message(value)
        messages.append(message)
        ignored += unused
    return Messages(messages, ignored, getattr(values, "tools", None))


def _message(message: Any) -> tuple[Message, list[str]]:
    """Read one message; returns it and the names of its non-empty fields that are not used."""
    if not isinstance(message, Mapping):
        raise DropRow("wrong type")
    role, content = message.get("role"), message.get("content")
    if role is None and (content is None or "from" in message):
        role, content = message.get("from"), message.get("value", content)
    if not isinstance(role, str):
        raise DropRow("wrong type")
    name = role.strip().lower()
    calls = _tool_calls(message) if ROLES.get(name) == "assistant" else []
    if name == "function_call" and isinstance(content, str) and (call := _call_of(content)) is not None:
        name, content, calls = "assistant", "", [call]
    if name not in ROLES:
        raise DropRow("unknown role", f"'{check_text(role)[:40]}'")
    result: Message = {"role": ROLES[name], "content": _content(content, bool(calls))}
    if calls:
        result["tool_calls"] = calls
    ignored = []
    for key, value in message.items():
        if key in ("role", "content", "from", "value") or _is_empty(value):
            continue
        if key in ("tool_calls", "function_call") and (calls or result["role"] == "assistant"):
            continue
        if key in NOT_TEXT:
            raise DropRow("not text", key)
        if key in _THINKING and isinstance(value, str):
            result["reasoning_content"] = check_text(value)
        elif key in ("tool_call_id", "name") and isinstance(value, str) and result["role"] == "tool":
            result[key] = check_text(value)
        else:
            ignored.append(str(key).encode(errors="replace").decode())
    return result, ignored


def _as_list(value: Any) -> Any:
    """A list for an array of numpy; other values unchanged."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def _is_empty(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | tuple | dict) and not len(value))


def _content(content: Any, may_be_missing: bool) -> str:
    if isinstance(content, str):
        return check_text(content)
    if content is None and may_be_missing:
        return ""
    content = _as_list(content)
    if isinstance(content, list | tuple) and content:
        return "".join(_part(part) for part in content)
    if isinstance(content, Mapping):
        return _part(content)
    raise DropRow("wrong type")


def _part(part: Any) -> str:
    """The text of one part of a message's content."""
    if isinstance(part, str):
        return check_text(part)
    if not isinstance(part, Mapping):
        raise DropRow("wrong type")
    kind, text = part.get("type", "text"), part.get("text")
    if kind not in ("text", "input_text", "output_text"):
        raise DropRow("not text", str(kind)[:40])
    if not isinstance(text, str):
        raise DropRow("wrong type")
    return check_text(text)


def _tool_calls(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tool calls of a message in the form of chat templates, arguments as a mapping."""
    values = message.get("tool_calls")
    if isinstance(values, str):
        values = _json_or_none(values) or values
    if _is_empty(values):
        values = [message["function_call"]] if not _is_empty(message.get("function_call")) else []
    if isinstance(values, Mapping):
        values = [values]
    values = _as_list(values)
    if not isinstance(values, list | tuple):
        raise DropRow("wrong type")
    calls = []
    for call in values:
        inner = call.get("function", call) if isinstance(call, Mapping) else _json_or_none(call)
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise DropRow("wrong type")
        arguments = inner.get("arguments", inner.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _json_or_none(arguments) if arguments.strip() else {}
        if not isinstance(arguments, Mapping):
            raise DropRow("wrong type")
        # Arrow adds nulls for fields of other calls in the column.
        given = {key: value for key, value in arguments.items() if value is not None}
        calls.append({"type": "function", "function": {"name": inner["name"], "arguments": given}})
    return calls


def _call_of(text: str) -> dict[str, Any] | None:
    """A tool call that is the text of a separate turn (ShareGPT's `function_call`)."""
    value = _json_or_none(text)
    if not isinstance(value, Mapping) or "name" not in value:
        return None
    (call,) = _tool_calls({"tool_calls": [value]})
    return call


def _json_or_none(text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None


def read_tools(value: Any) -> list[Any]:
    """The tools of a row as a list of schemas, also from JSON text.

    Raises:
        DropRow: the value is no list of schemas.
    """
    if isinstance(value, str) and value.strip():
        value = _json_or_none(value)
        if value is None:
            raise DropRow("tools", "not JSON")
    value = _as_list(value)
    if _is_empty(value) or (isinstance(value, str) and not value.strip()):
        return []
    tools = [value] if isinstance(value, Mapping) else value
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DropRow("tools", "no list of schemas")
    return [_without_nulls(tool) for tool in tools]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item) for item in value]
    return value


def leaves(value: Any) -> list[str]:
    """All strings of a nested value except keys: the texts of a tool call that a template must write."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return []


def map_text(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to every string of a nested value, including keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {map_text(key, change): map_text(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_text(item, change) for item in value]
    return value
