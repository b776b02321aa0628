"""Replies of a server to chat completions, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from sepo.errors import one_line

UNANSWERED = "no reply"


class Reply(NamedTuple):
    """The answer of a server, or why there is none.

    Attributes:
        text: of the message; empty without one.
        logprobs: log-probabilities in nats of the alternatives of each token of the text; empty if not returned.
        failure: why this is no answer; None for an answer.
        usage: tokens of prompt and completion, as counted by the server.
        seconds: duration of the request.
        cached: the reply was on disk and cost nothing now.
    """

    text: str
    logprobs: tuple[Mapping[str, float], ...] = ()
    failure: str | None = None
    usage: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    cached: bool = False

    @property
    def unanswered(self) -> bool:
        """The server sent no reply at all. Such a question is asked again by the next command."""
        return self.failure is not None and self.failure.startswith(UNANSWERED)


@dataclass
class Spent:
    """The cost of a set of questions.

    Attributes:
        asked, cached, retried: questions sent and answered, questions found on disk, requests sent again.
        malformed, unanswered: replies that are no answer (kept), and questions without a reply (asked again next time).
        prompt_tokens, completion_tokens: of the questions asked now, as counted by the server.
        seconds: sum over all requests; `elapsed`: wall time.
    """

    asked: int = 0
    cached: int = 0
    retried: int = 0
    malformed: int = 0
    unanswered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    elapsed: float = 0.0

    def count(self, reply: Reply) -> None:
        """Add one question's reply."""
        self.malformed += reply.failure is not None and not reply.unanswered
        self.unanswered += reply.unanswered
        self.cached += reply.cached
        if not reply.cached and not reply.unanswered:
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
        parts += [f"{self.unanswered} without a reply"] * bool(self.unanswered)
        parts.append(f"{self.prompt_tokens:,} + {self.completion_tokens:,} tokens in {self.elapsed:.0f} s")
        if prices is not None:
            parts.append(f"cost {self.cost(prices):.4g}")
        return ", ".join(parts)


def read_reply(stored: Any) -> Reply:
    """Read a chat completion; a reply of another form gets a failure."""
    usage = _usage(stored)
    try:
        choice = stored["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        message = stored.get("error", stored.get("unreadable", "")) if isinstance(stored, dict) else ""
        failure = f"malformed reply {one_line(message, 100)}" if message else "malformed reply"
        return Reply("", failure=failure, usage=usage)
    if not isinstance(text, str) or not text.strip():
        return Reply("", _logprobs(choice), "empty reply", usage)
    return Reply(text, _logprobs(choice), None, usage)


def _usage(stored: Any) -> tuple[int, int]:
    usage = stored.get("usage") if isinstance(stored, dict) else None
    counts = usage if isinstance(usage, dict) else {}

    def number(name: str) -> int:
        value = counts.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9 else 0

    return number("prompt_tokens"), number("completion_tokens")


def _logprobs(choice: Any) -> tuple[Mapping[str, float], ...]:
    try:
        return tuple(
            {str(entry["token"]): float(entry["logprob"]) for entry in [*token.get("top_logprobs", []), token]}
            for token in choice["logprobs"]["content"]
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return ()
