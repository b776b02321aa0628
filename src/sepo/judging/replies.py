"""What a server sends to a question, understood in one place: docs/judging.md has the table.

`completion_of` decides whether a body is a whole chat completion, which is kept for good. Anything else stands for an
HTTP status and is treated as that status: asked again (5xx), or refused (4xx). `read_reply` reads the answer of a kept
completion: its text without thinking, and whether the length limit cut it off.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from sepo.data.thinking import without_thinking
from sepo.errors import one_line

# Beginnings of a failure: the server sent no reply, refused the question (for its text), or reached the length limit.
UNANSWERED, REFUSED, CUT = "no reply", "refused", "cut off at the length limit"
REFUSED_TEXT = f"{REFUSED} for its text"
NO_END = "the thinking has no end"
# Servers name the length limit "length", "MAX_TOKENS", "model_length", "model_context_window_exceeded", "truncated".
_AT_LIMIT = re.compile("length|max_|context|truncat", re.IGNORECASE)
_FILTERED = re.compile(
    "filter|safety|prohibited|block|recitation|sensitive|spii|refus|guardrail|moderation|policy", re.IGNORECASE
)
_BROKEN_OFF = re.compile("error|abort|cancel|time_?out|interrupt|insufficient|overload|unavailable", re.IGNORECASE)
_TEXT_PARTS = (None, "text", "output_text")
_THINKING_FIELDS = ("reasoning_content", "reasoning", "thinking", "reasoning_details", "thinking_blocks")
# The key of a stored refusal, beside the keys of a chat completion.
_REFUSAL = "refused"
_OF_QUESTION = re.compile(
    r"context[ _-]?(length|window|size)|too (long|large|many (input )?tokens)|maximum (context|input|model|prompt) "
    r"|prompt.{0,40}longer|exceed(s|ed)? .{0,40}(tokens|length|limit)|(less|fewer) than \d+ tokens|must be <= \d+"
    r"|reduce the (length|number of)|input length|content[ _](policy|filter|management|exists)|moderation|flagged"
    r"|inappropriate|violat|prompt.{0,20}blocked|data_inspection",
    re.IGNORECASE,
)
# A refusal in such words is about the account, and no other question will be answered.
_OF_ACCOUNT = re.compile(
    r"api[ _-]?key.{0,30}(valid|missing|expired|required|not found)|(invalid|incorrect|missing|no) api[ _-]?key"
    r"|credit balance|(insufficient|not enough|out of|no) (credits?|balance|funds|quota)|billing"
    r"|(account|subscription|organi[sz]ation).{0,40}(disabled|suspended|expired|inactive|deactivated|overdue)",
    re.IGNORECASE,
)


class Reply(NamedTuple):
    """The answer of a server, or why there is none.

    Attributes:
        text: of the answer, without thinking; empty without an answer.
        logprobs: log-probabilities in nats of the alternatives of each token of the text; empty if not returned, or if
            thinking precedes the answer.
        failure: why this is no answer; None for an answer.
        usage: tokens of prompt and completion, as counted by the server.
        seconds: duration of the request.
        cached: the reply was on disk and cost nothing now.
        cut: the length limit ended the text, not the model.
        tokens: number of tokens of the text; an estimate if the server counts thinking with it.
    """

    text: str
    logprobs: tuple[Mapping[str, float], ...] = ()
    failure: str | None = None
    usage: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    cached: bool = False
    cut: bool = False
    tokens: int = 0

    @property
    def unanswered(self) -> bool:
        """The server sent no reply. Such a question is asked again by the next command."""
        return self.failure is not None and self.failure.startswith(UNANSWERED)

    @property
    def refused(self) -> bool:
        """The server refused the question for good. It is not asked again."""
        return self.failure is not None and self.failure.startswith(REFUSED)

    @property
    def answered(self) -> bool:
        """The server sent a whole chat completion, which is paid for."""
        return not self.unanswered and not self.refused


@dataclass
class Spent:
    """The cost of a set of questions.

    Attributes:
        asked, cached, retried: questions sent and answered, questions found on disk, requests sent again.
        malformed, unanswered: replies that are no answer (kept), and questions without a reply (asked again next time).
        refused: questions that the server refuses for good (kept).
        cut: replies that the length limit cut off before an answer (kept).
        prompt_tokens, completion_tokens: of the questions asked now, as counted by the server.
        seconds: sum over all requests; `elapsed`: wall time.
    """

    asked: int = 0
    cached: int = 0
    retried: int = 0
    malformed: int = 0
    unanswered: int = 0
    refused: int = 0
    cut: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    elapsed: float = 0.0

    def count(self, reply: Reply) -> None:
        """Add one question's reply."""
        self.malformed += reply.failure is not None and reply.answered and not reply.cut
        self.unanswered += reply.unanswered
        self.refused += reply.refused
        self.cut += reply.failure is not None and reply.cut
        self.cached += reply.cached
        if reply.answered and not reply.cached:
            self.asked += 1
            self.prompt_tokens += reply.usage[0]
            self.completion_tokens += reply.usage[1]
            self.seconds += reply.seconds

    def cost(self, prices: tuple[float, float]) -> float:
        """The cost in the currency of the prices, which are for a million tokens of prompt and of completion."""
        return (self.prompt_tokens * prices[0] + self.completion_tokens * prices[1]) / 1e6

    def __add__(self, other: Spent) -> Spent:
        return Spent(**{name: value + getattr(other, name) for name, value in asdict(self).items()})

    def in_words(self, prices: tuple[float, float] | None = None) -> str:
        """Counts, tokens, time and, with prices, cost in one line."""
        parts = [f"{self.asked} calls", f"{self.cached} from the cache", f"{self.retried} retries"]
        parts += [f"{self.malformed} malformed replies"] * bool(self.malformed)
        parts += [f"{self.cut} cut off at the length limit"] * bool(self.cut)
        parts += [f"{self.refused} refused"] * bool(self.refused)
        parts += [f"{self.unanswered} without a reply"] * bool(self.unanswered)
        parts.append(f"{self.prompt_tokens:,} + {self.completion_tokens:,} tokens in {self.elapsed:.0f} s")
        if prices is not None:
            parts.append(f"cost {self.cost(prices):.4g}")
        return ", ".join(parts)


# --- a body -> a whole chat completion ------------------------------------------------------------------------------


class NoCompletion(Exception):
    """A body of status 200 that is no whole chat completion.

    Attributes:
        status: the HTTP status that the body stands for.
    """

    def __init__(self, status: int, reason: object):
        super().__init__(one_line(reason, 300))
        self.status = status


def completion_of(body: str) -> dict[str, Any]:
    """The chat completion in a body; the chunks of a stream are joined.

    Raises:
        NoCompletion: the body is an error, broke off, or is something else.
    """
    text = _COMMENTS.sub("", body)
    stored = _joined(text) if text.startswith(("data:", "event:", "id:", "retry:")) else _parsed(text)
    if not isinstance(stored, dict):
        raise NoCompletion(502, f"unreadable reply {one_line(body, 100) if body.strip() else 'without a text'}")
    choice = _first_choice(stored)
    error = stored.get("error") or choice.get("error") or (stored if stored.get("object") == "error" else None)
    if error:
        raise NoCompletion(_status_of(error), _message_of(error))
    if not isinstance(stored.get("choices"), list):
        raise NoCompletion(502, f"no chat completion {one_line(body, 100)}")
    if _BROKEN_OFF.search(str(choice.get("finish_reason"))):
        raise NoCompletion(502, f"the server ended the reply ({choice['finish_reason']})")
    return stored


def is_of_question(status: int, text: str) -> bool:
    """Whether a refusal is about the text of the question (too long, not allowed), not about a setting or the key.

    Some servers (llama.cpp, Ollama) call a question that is too long an error of the server: 500.
    """
    return status == 413 or (status in (400, 403, 422, 500) and _OF_QUESTION.search(message_in(text)) is not None)


def is_of_account(status: int, text: str) -> bool:
    """Whether a refusal is about the key or an account without credit. Some servers answer 400 then."""
    return status in (400, 403) and _OF_ACCOUNT.search(message_in(text)) is not None


def message_in(text: str) -> str:
    """The message of an error in the body of a reply; the text if it holds none."""
    stored = _parsed(text)
    stored = stored[0] if isinstance(stored, list) and stored else stored  # Gemini
    if not isinstance(stored, dict):
        return text
    found = stored.get("error") or stored.get("message") or stored.get("detail") or stored.get("msg")
    if isinstance(found, list):  # FastAPI, which repeats the question in `input`
        found = "; ".join(str(item["msg"] if isinstance(item, dict) and "msg" in item else item) for item in found)
    return str(_message_of(found)) if found else text


def refusal(reply: Reply) -> dict[str, str]:
    """The stored form of a refused question."""
    return {_REFUSAL: str(reply.failure)}


# Comments of a stream, which some servers send before a body too, to keep the connection open.
_COMMENTS = re.compile(r"\A\ufeff?\s*(?::[^\n]*\n\s*)*")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, strict=False)  # line ends inside of texts, from servers that do not escape them
    except (ValueError, RecursionError):
        return None


def _joined(body: str) -> dict[str, Any] | None:
    """The completion in the chunks of a stream; None if the stream broke off."""
    text: dict[str, str] = {}
    logprobs: list[Any] = []
    whole: dict[str, Any] = {}
    ended, reason, event = False, None, ""
    for line in body.split("\n"):  # splitlines would also cut at U+2028 inside a text
        data = line.removeprefix("data:").strip()
        if line.startswith("event:") or not line.strip():
            event = line.removeprefix("event:").strip()
        if not line.startswith("data:") or not data:
            continue
        if data == "[DONE]":
            ended = True
            break
        if not isinstance(chunk := _parsed(data), dict):
            return None
        if event == "error":
            return {"error": chunk.get("error") or chunk}
        if chunk.get("error") or chunk.get("object") == "error":
            return chunk
        whole |= {name: value for name, value in chunk.items() if name != "choices" and value is not None}
        choice = _first_choice(chunk)
        if choice.get("index"):
            continue  # of a second completion
        reason = choice.get("finish_reason") or reason
        if isinstance(tokens := choice.get("logprobs"), dict):
            logprobs += tokens.get("content") or []
        delta = choice.get("delta") or choice.get("message")
        for name, value in delta.items() if isinstance(delta, dict) else ():
            value = _text_of(value) if name == "content" else value
            if isinstance(value, str) and name != "role":
                text[name] = text.get(name, "") + value
    if not ended and reason is None:
        return None
    choice = {"index": 0, "message": {"role": "assistant", **text}, "finish_reason": reason}
    return {**whole, "choices": [choice | ({"logprobs": {"content": logprobs}} if logprobs else {})]}


def _first_choice(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = stored.get("choices")
    choices = [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
    return next((choice for choice in choices if choice.get("index") == 0), choices[0] if choices else {})


def _status_of(error: Any) -> int:
    """The HTTP status that an error inside a body stands for; 502 where it names none."""
    fields = error if isinstance(error, dict) else {}
    for name in ("code", "status", "status_code", "http_status"):
        code = str(fields.get(name, ""))
        if code.isdecimal() and 400 <= int(code) < 600:
            return int(code)
    words = f"{fields.get('code')} {fields.get('type')} {fields.get('status')}".lower()
    if "quota" in words:
        return 429
    refused = ("invalid_request", "badrequest", "bad_request", "invalid_argument", "context_length", "unprocessable")
    return 400 if any(word in words for word in refused) else 502


def _message_of(error: Any) -> object:
    message = error.get("message") if isinstance(error, dict) else None
    if not isinstance(message, str) or not message.strip():
        return error
    code = str(error.get("code") or error.get("type"))  # "context_length_exceeded" may say what the message does not
    return f"{message} ({code})" if _OF_QUESTION.search(code) and not _OF_QUESTION.search(message) else message


# --- a chat completion -> an answer ---------------------------------------------------------------------------------


def read_reply(stored: Any) -> Reply:
    """Read a kept reply: a chat completion, or a refusal."""
    if not isinstance(stored, dict):
        return Reply("", failure="malformed reply")
    if _REFUSAL in stored:
        return Reply("", failure=one_line(stored[_REFUSAL], 300))
    usage = _usage(stored)
    choice = _first_choice(stored)
    message = choice.get("message")
    if not isinstance(message, dict) or not message:
        reason = one_line(stored["unreadable"], 100) if stored.get("unreadable") else ""
        return Reply("", failure=f"malformed reply {reason}".strip(), usage=usage)
    ended = str(choice.get("finish_reason"))
    cut = _AT_LIMIT.search(ended) is not None
    written, apart = _texts(message)
    text = without_thinking(written)
    thought = apart or text is None or text != written
    failure = None
    if text is None:
        failure = f"{CUT}, while thinking" if cut else NO_END
    elif _FILTERED.search(ended):
        failure = "stopped by the server's content filter"
    elif not text.strip():
        refused = message.get("refusal")
        failure = f"empty reply: {one_line(refused, 100)}" if isinstance(refused, str) and refused else "empty reply"
        failure = f"{CUT}, before an answer" if cut else failure
    if failure is not None:
        return Reply("", failure=failure, usage=usage, cut=cut)
    assert text is not None
    tokens = _answer_tokens(stored, usage[1], len(text) / len(written) if thought else 1.0)
    return Reply(text, () if thought else _logprobs(choice), None, usage, cut=cut, tokens=tokens)


def _texts(message: Mapping[str, Any]) -> tuple[str, bool]:
    """The text of a message, its parts joined; and whether the message holds thinking beside its text."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    unread = any(_text_of(part) is None for part in parts if part is not None)
    return _text_of(content) or "", unread or any(message.get(name) for name in _THINKING_FIELDS)


def _text_of(content: Any) -> str | None:
    """The text in the content of a message or in one of its parts; None for another part, such as thinking."""
    if isinstance(content, list):
        return "".join(filter(None, (_text_of(part) for part in content if isinstance(part, dict))))
    if not isinstance(content, dict):
        return content if isinstance(content, str) else None
    text = content.get("text") if content.get("type") in _TEXT_PARTS else None
    text = text.get("value") if isinstance(text, dict) else text  # of OpenAI's assistants
    return text if isinstance(text, str) else None


def _answer_tokens(stored: Mapping[str, Any], completion: int, share: float) -> int:
    """Tokens of the answer: without the server's count of thinking, or the answer's share of the characters."""
    usage = stored.get("usage")
    details = usage.get("completion_tokens_details") if isinstance(usage, dict) else None
    thinking = _count(details, "reasoning_tokens")
    if 0 < thinking < completion:
        return completion - thinking
    return min(completion, -int(-completion * share // 1))


def _usage(stored: Mapping[str, Any]) -> tuple[int, int]:
    return _count(stored.get("usage"), "prompt_tokens"), _count(stored.get("usage"), "completion_tokens")


def _count(counts: Any, name: str) -> int:
    value = counts.get(name) if isinstance(counts, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9 else 0


def _logprobs(choice: Any) -> tuple[Mapping[str, float], ...]:
    try:
        return tuple(
            {str(entry["token"]): float(entry["logprob"]) for entry in [*token.get("top_logprobs", []), token]}
            for token in choice["logprobs"]["content"]
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return ()
