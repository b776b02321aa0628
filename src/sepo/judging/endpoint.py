"""Chat completions of any OpenAI-compatible server: bounded, retried, cached by content, and counted.

What costs money must not be lost or paid twice. So every reply is on disk before anything else happens with it, under
a digest of what was asked; the same question is asked once, in this run, the next one and another folder. Replies that
make no sense were paid for too: they are kept and handed on, for the caller to count. Only where there is no reply at
all (429, 5xx, a connection that breaks, a server that hangs) is a question asked again, after a growing pause, and what
fails to the end is not cached: the same command asks again.

The key comes from an environment variable, goes into one header of requests to one address (redirects are not
followed), and is cut out of whatever the server sends back.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sepo.bars import progress_bar
from sepo.errors import UserError, check_number, one_line
from sepo.files import digest, expand_home, write_json

KEY_VARIABLE = "OPENAI_API_KEY"
MOST_BYTES = 16 * 2**20  # a reply longer than this is no answer
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
_ENDS_ALL = {401: "refuses the key", 403: "refuses the key", 404: "knows no such path or model"}
_LONGEST_PAUSE = 60.0


class Reply(NamedTuple):
    """What a server answered, or why there is no answer.

    Attributes:
        text: of the message; empty where there is none.
        logprobs: of the alternatives of each token of the text, in nats; empty where they are not given.
        failure: why this is no answer; None if it is one.
        usage: tokens of prompt and completion, as the server counts them.
        seconds: that the request took.
        cached: it was there already and cost nothing now.
    """

    text: str
    logprobs: tuple[Mapping[str, float], ...] = ()
    failure: str | None = None
    usage: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    cached: bool = False


@dataclass
class Spent:
    """What a set of questions cost.

    Attributes:
        asked, cached, retried: questions sent and answered, found on disk, and sent again.
        malformed, unanswered: replies that are no answer (kept), and questions without a reply (asked again next time).
        prompt_tokens, completion_tokens: as the server counted them, of what was asked now.
        seconds: of all requests together; `elapsed` of the clock.
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

    def cost(self, prices: tuple[float, float]) -> float:
        """In the currency of the prices, which are for a million tokens of prompt and of completion."""
        return (self.prompt_tokens * prices[0] + self.completion_tokens * prices[1]) / 1e6


@dataclass(frozen=True)
class Endpoint:
    """A model behind a server.

    Attributes:
        url: up to and including the version, as `http://localhost:8000/v1`.
        model: its name there.
        key_variable: environment variable that holds the key, if it is set.
        concurrency: requests under way at once.
        timeout: seconds that a request may take in all.
        retries: how often a question without a reply is asked again.
        pause: seconds before the first retry; each further one waits twice as long.
        cache: folder of the replies; None for `$SEPO_CACHE/replies`, else `~/.cache/sepo/replies`.
        retry_malformed: ask again what has a reply on disk that is no answer.
    """

    url: str
    model: str
    key_variable: str = KEY_VARIABLE
    concurrency: int = 8
    timeout: float = 300.0
    retries: int = 6
    pause: float = 1.0
    cache: str | None = None
    retry_malformed: bool = False
    _parts: urllib.parse.SplitResult = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            parts = urllib.parse.urlsplit(self.url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None
            _ = parts.port
        except ValueError:
            good = False
        if not good or any(c.isspace() for c in self.url):
            raise UserError(
                f"the server '{one_line(self.url, 100)}' is no address: expected http://HOST:PORT/v1, no key in it"
            )
        if not self.model:
            raise UserError("a server needs the name of the model to ask: --model-name (recipe: eval.judge.model)")
        check_number("concurrency", self.concurrency, whole=True, least=1, most=1024)
        check_number("timeout", self.timeout, above=0, most=86_400)
        check_number("retries", self.retries, whole=True, least=0, most=100)
        key = os.environ.get(self.key_variable, "")
        if not key.isascii() or not key.isprintable():
            raise UserError(f"${self.key_variable} holds characters that no key has: set it again, without line ends")
        object.__setattr__(self, "_parts", parts)

    @property
    def cache_folder(self) -> Path:
        """Where replies are kept."""
        if self.cache is not None:
            return Path(expand_home(self.cache, "the cache of replies"))
        return Path(expand_home(os.environ.get("SEPO_CACHE") or "~/.cache/sepo", "the cache")) / "replies"

    def request(self, messages: Sequence[Mapping[str, str]], **settings: Any) -> dict[str, Any]:
        """The body of a question; settings are the server's (temperature, max_tokens, seed, logprobs, ...)."""
        return {"model": self.model, "messages": [dict(message) for message in messages], **settings}

    def cached(self, request: Mapping[str, Any]) -> Reply | None:
        """The reply to a question that is on disk; None if there is none, or a damaged one."""
        try:
            stored = json.loads(self._place(request).read_text(encoding="utf-8"))
            if stored["request"] != request:
                return None
            reply = _read_reply(stored["reply"])._replace(seconds=float(stored["seconds"]), cached=True)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return None if self.retry_malformed and reply.failure else reply

    def _place(self, request: Mapping[str, Any]) -> Path:
        # The address belongs to it: what is called "default" is another model elsewhere.
        name = digest({"url": self.url.rstrip("/"), "request": request})
        return self.cache_folder / name[:2] / f"{name}.json"

    def ask_all(
        self,
        requests: Sequence[Mapping[str, Any]],
        description: str = "ask",
        done: Callable[[int, Reply], None] = lambda number, reply: None,
    ) -> tuple[list[Reply], Spent]:
        """Replies to all questions, in their order. Equal questions are asked once.

        Args:
            done: called in this thread with each number and reply as it comes.

        Raises:
            UserError: the server refuses the key, or knows no such model: no further question is sent.
        """
        began = time.monotonic()
        spent = Spent()
        replies: list[Reply | None] = [None] * len(requests)
        requests = [json.loads(json.dumps(request)) for request in requests]  # as they are read from the disk again
        same: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            same.setdefault(str(self._place(request)), []).append(number)
        stop = threading.Event()

        def take(numbers: list[int], reply: Reply) -> None:
            spent.malformed += reply.failure is not None and not _no_reply(reply)
            spent.unanswered += _no_reply(reply)
            for number in numbers:
                replies[number] = reply
                done(number, reply)

        def work(request: Mapping[str, Any]) -> tuple[Reply, int]:
            return self._ask(request, stop)

        waiting = []
        silent = 0  # questions in a row that nobody answered
        with progress_bar(True, total=len(same), desc=description, unit="call") as bar:
            for numbers in same.values():
                if (reply := self.cached(requests[numbers[0]])) is not None:
                    spent.cached += 1
                    take(numbers, reply)
                    bar.update()
                else:
                    waiting.append(numbers)
            pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint")
            under_way: dict[Future, list[int]] = {}
            try:
                queue = iter(waiting)
                while True:
                    while len(under_way) < 2 * self.concurrency and (numbers := next(queue, [])) != []:
                        under_way[pool.submit(work, requests[numbers[0]])] = numbers
                    if not under_way:
                        break
                    for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                        reply, retried = future.result()
                        spent.retried += retried
                        silent = silent + 1 if _no_reply(reply) else 0
                        if silent > 2 * self.concurrency + 3:
                            raise UserError(
                                f"the server {self.url} has stopped answering ({one_line(reply.failure, 150)}): "
                                "replies that came are kept; the same command asks for the rest"
                            )
                        if not _no_reply(reply):
                            spent.asked += 1
                            spent.prompt_tokens += reply.usage[0]
                            spent.completion_tokens += reply.usage[1]
                            spent.seconds += reply.seconds
                        take(under_way.pop(future), reply)
                        bar.update()
            finally:
                stop.set()
                # Questions under way are paid for: their replies are waited for and kept.
                pool.shutdown(wait=True, cancel_futures=True)
        spent.elapsed = time.monotonic() - began
        return [reply if reply is not None else Reply("", failure=UNANSWERED) for reply in replies], spent

    def _ask(self, request: Mapping[str, Any], stop: threading.Event) -> tuple[Reply, int]:
        """One question until it has a reply; the number of times that it was sent again."""
        failure = UNANSWERED
        for attempt in range(self.retries + 1):
            if stop.is_set():
                return Reply("", failure=f"{UNANSWERED}: stopped"), attempt
            began = time.monotonic()
            pause = min(self.pause * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.75, 1.25)
            try:
                status, asked_pause, body = self._send(request)
            except (OSError, http.client.HTTPException, ValueError) as error:
                failure = f"{UNANSWERED}: {one_line(type(error).__name__ + ' ' + str(error), 120)}"
            else:
                text = self._without_key(body)
                if status == 200:
                    return self._keep(request, text, time.monotonic() - began), attempt
                failure = f"{UNANSWERED}: HTTP {status} {one_line(text, 120) if text.strip() else ''}".rstrip()
                if status in _ENDS_ALL:
                    raise UserError(f"the server {self.url} {_ENDS_ALL[status]} (HTTP {status}: {one_line(text, 200)})")
                if status not in _AGAIN:
                    return Reply("", failure=failure), attempt
                pause = max(pause, min(asked_pause, _LONGEST_PAUSE))
            if attempt < self.retries:
                stop.wait(pause)
        return Reply("", failure=failure), self.retries

    def _send(self, request: Mapping[str, Any]) -> tuple[int, float, bytes]:
        """POST once: status, seconds that the server asks to wait, body. The clock runs for all of it."""
        parts = self._parts
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        # A socket's own timeout begins anew with every byte: a server that drips would hold on for ever.
        late = threading.Event()
        connection.connect()
        line = connection.sock  # a connection forgets it once it reads the reply

        def cut() -> None:
            late.set()
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self.timeout, cut)
        timer.daemon = True
        timer.start()
        try:
            path = f"{parts.path.rstrip('/')}/chat/completions" + (f"?{parts.query}" if parts.query else "")
            connection.request("POST", path, json.dumps(request).encode(), headers)
            response = connection.getresponse()
            body = response.read(MOST_BYTES + 1)
            if late.is_set():
                raise TimeoutError(f"no whole reply in {self.timeout:g} s")
            if len(body) > MOST_BYTES:
                body = b'{"error": "longer than 16 MiB"}'
            return response.status, _seconds(response.getheader("Retry-After")), body
        except (OSError, http.client.HTTPException):
            if late.is_set():
                raise TimeoutError(f"no whole reply in {self.timeout:g} s") from None
            raise
        finally:
            timer.cancel()
            connection.close()

    def _without_key(self, body: bytes) -> str:
        text = body.decode("utf-8", "replace")
        key = os.environ.get(self.key_variable)
        return text.replace(key, "[key]") if key else text

    def _keep(self, request: Mapping[str, Any], text: str, seconds: float) -> Reply:
        """Write a reply to the disk, then read it."""
        try:
            stored = json.loads(text)
        except (ValueError, RecursionError):
            stored = {"unreadable": one_line(text, 2000)}
        # What was asked is there too: a cache that nobody can read is one that nobody can check.
        write_json(self._place(request), {"request": request, "reply": stored, "seconds": seconds}, indent=None)
        return _read_reply(stored)._replace(seconds=seconds)


UNANSWERED = "no reply"


def _no_reply(reply: Reply) -> bool:
    return reply.failure is not None and reply.failure.startswith(UNANSWERED)


def _seconds(text: str | None) -> float:
    """Of a Retry-After header in seconds; 0 for a date or nonsense."""
    try:
        number = float(text or 0)
    except ValueError:
        return 0.0
    return number if 0 <= number < 1e6 else 0.0


def _read_reply(stored: Any) -> Reply:
    """The answer in a chat completion; a reply of another form is one with a failure."""
    try:
        choice = stored["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        said = stored.get("error", stored.get("unreadable", "")) if isinstance(stored, dict) else ""
        return Reply(
            "", failure=f"malformed reply {one_line(said, 100) if said else ''}".rstrip(), usage=_usage(stored)
        )
    usage = _usage(stored)
    if not isinstance(text, str) or not text.strip():
        return Reply("", _logprobs(choice), "empty reply", usage)
    return Reply(text, _logprobs(choice), None, usage)


def _usage(stored: Any) -> tuple[int, int]:
    usage = stored.get("usage") if isinstance(stored, dict) else None
    if not isinstance(usage, dict):
        return 0, 0
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return tuple(n if isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 10**9 else 0 for n in counts)  # type: ignore[return-value]


def _logprobs(choice: Any) -> tuple[Mapping[str, float], ...]:
    try:
        tokens = choice["logprobs"]["content"]
        return tuple(
            {str(one["token"]): float(one["logprob"]) for one in [*token.get("top_logprobs", []), token]}
            for token in tokens
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return ()


class CallEstimate(NamedTuple):
    """What a set of questions is expected to take: how many are new, tokens at most, seconds, cost."""

    questions: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    cost: float | None


def estimate_calls(
    endpoint: Endpoint,
    requests: Sequence[Mapping[str, Any]],
    prices: tuple[float, float] | None = None,
    seconds_each: float = 2.0,
) -> CallEstimate:
    """Before anything is asked: four characters a token, completions as long as they may be, and the mean time of the
    replies to these questions that are on disk, or `seconds_each`.
    """
    new: dict[str, Mapping[str, Any]] = {}
    known: list[float] = []
    for request in requests:
        reply = endpoint.cached(request)
        if reply is None:
            new[str(endpoint._place(request))] = request
        else:
            known.append(reply.seconds)
    characters = sum(len(message["content"]) for request in new.values() for message in request["messages"])
    completion = sum(int(request.get("max_tokens", 0)) for request in new.values())
    each = sum(known) / len(known) if known else seconds_each
    spent = Spent(prompt_tokens=characters // 4 + 8 * len(new), completion_tokens=completion)
    return CallEstimate(
        len(new), len(known), spent.prompt_tokens, completion,
        len(new) * each / endpoint.concurrency, None if prices is None else spent.cost(prices),
    )  # fmt: skip
