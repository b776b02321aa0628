"""Chat completions of any OpenAI-compatible server: cached by content and counted.

Paid replies must neither be lost nor be paid twice. So every reply is written to disk before anything else happens with
it, under a digest of its request, and the same question is asked once: in this run, in the next one and from another
folder. A malformed reply was paid for too: it is kept and handed on, and the caller counts it. Only a question without
any reply (429, 5xx, a broken connection, a server that hangs) is asked again, after a growing pause. A question that
fails every time is not cached, so the same command asks it again.

The key comes from an environment variable, is sent to one address in one header (redirects are not followed), and is
removed from every text of the server.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from sepo.bars import progress_bar
from sepo.errors import UserError, check_number, one_line
from sepo.files import digest, expand_home, write_json
from sepo.judging.replies import UNANSWERED, Reply, Spent, read_reply

KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Endpoint:
    """A model behind a server.

    Attributes:
        url: up to and including the version, such as `http://localhost:8000/v1`.
        model: its name there.
        key_variable: environment variable with the key; it may be unset.
        concurrency: number of simultaneous requests.
        timeout: seconds that a request may take in all.
        retries: how often a question without a reply is asked again.
        cache: folder of the replies; None for `$SEPO_CACHE/replies`, else `~/.cache/sepo/replies`.
        retry_malformed: ask again where the reply on disk is malformed.
    """

    url: str
    model: str
    key_variable: str = KEY_VARIABLE
    concurrency: int = 8
    timeout: float = 300.0
    retries: int = 6
    cache: str | None = None
    retry_malformed: bool = False

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None
            _ = parts.port
        except ValueError:
            good = False
        if not good or not self.url.isprintable() or any(c.isspace() for c in self.url):
            raise UserError(
                f"the server '{one_line(self.url, 100)}' is no address: expected http://HOST:PORT/v1, no key in it"
            )
        if not self.model:
            raise UserError("a server needs the name of the model to ask: --model-name (recipe: eval.judge.model)")
        check_number("concurrency", self.concurrency, whole=True, least=1, most=1024)
        check_number("timeout", self.timeout, above=0, most=86_400)
        check_number("retries", self.retries, whole=True, least=0, most=100)
        if not self._key.isascii() or not self._key.isprintable():
            raise UserError(f"${self.key_variable} holds characters that no key has: set it again, without line ends")
        if importlib.util.find_spec("openai") is None:
            raise UserError(f'the server {self.url} needs the package openai: run `pip install -e ".[judge]"`')

    @property
    def _key(self) -> str:
        return os.environ.get(self.key_variable, "")

    @property
    def cache_folder(self) -> Path:
        """The folder of the replies."""
        if self.cache is not None:
            return Path(expand_home(self.cache, "the cache of replies"))
        return Path(expand_home(os.environ.get("SEPO_CACHE") or "~/.cache/sepo", "the cache")) / "replies"

    def request(self, messages: Sequence[Mapping[str, str]], **settings: Any) -> dict[str, Any]:
        """The body of a question; `settings` are the server's (temperature, max_tokens, seed, logprobs, ...)."""
        return {"model": self.model, "messages": [dict(message) for message in messages], **settings}

    def cached(self, request: Mapping[str, Any]) -> Reply | None:
        """The reply on disk to a question; None without one, or if its file is damaged."""
        try:
            stored = json.loads(self._path(request).read_text(encoding="utf-8"))
            if stored["request"] != request:
                return None
            reply = read_reply(stored["reply"])._replace(seconds=float(stored["seconds"]), cached=True)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return None if self.retry_malformed and reply.failure else reply

    def _path(self, request: Mapping[str, Any]) -> Path:
        # The address is part of the digest: a model called "default" is another one elsewhere.
        name = digest({"url": self.url.rstrip("/"), "request": request})
        return self.cache_folder / name[:2] / f"{name}.json"

    def _keep(self, request: Mapping[str, Any], text: str, seconds: float) -> Reply:
        """Write a reply to disk, then read it."""
        try:
            stored = json.loads(text)
        except (ValueError, RecursionError):
            stored = {"unreadable": one_line(text, 2000)}
        # The request is stored beside the reply, so that people can check the cache.
        write_json(self._path(request), {"request": request, "reply": stored, "seconds": seconds}, indent=None)
        return read_reply(stored)._replace(seconds=seconds)

    def ask_all(
        self,
        requests: Sequence[Mapping[str, Any]],
        description: str = "ask",
        done: Callable[[int, Reply], None] = lambda number, reply: None,
    ) -> tuple[list[Reply], Spent]:
        """Replies to all questions, in their order. Equal questions are asked once.

        Args:
            done: called in this thread with the number and the reply of each question as it comes.

        Raises:
            UserError: the server refuses the key, knows no such model, or has stopped answering. Nothing further is
                asked then.
        """
        began = time.monotonic()
        spent = Spent()
        replies = [Reply("", failure=UNANSWERED)] * len(requests)
        requests = [json.loads(json.dumps(request)) for request in requests]  # as read back from the cache
        equal: dict[Path, list[int]] = {}
        for number, request in enumerate(requests):
            equal.setdefault(self._path(request), []).append(number)

        with progress_bar(True, total=len(equal), desc=description, unit="call") as bar:

            def take(numbers: list[int], reply: Reply) -> None:
                spent.count(reply)
                for number in numbers:
                    replies[number] = reply
                    done(number, reply)
                bar.update()

            new = []
            for numbers in equal.values():
                if (reply := self.cached(requests[numbers[0]])) is None:
                    new.append(numbers)
                else:
                    take(numbers, reply)
            if new:
                from sepo.judging.client import Client

                client = Client(
                    self.url,
                    self._key,
                    concurrency=self.concurrency,
                    timeout=self.timeout,
                    retries=self.retries,
                    keep=self._keep,
                )
                client.ask_all([requests[numbers[0]] for numbers in new], lambda i, reply: take(new[i], reply))
                spent.retried = client.sent - len(new)
        spent.elapsed = time.monotonic() - began
        return replies, spent


class CallEstimate(NamedTuple):
    """The expected cost of a set of questions: number of new and cached ones, most tokens, seconds, money."""

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
    """Estimate the cost before anything is asked.

    A token counts as four characters, and a completion has its greatest length. A call takes the mean time of those
    replies to these questions that are on disk; without any, `seconds_each`.
    """
    new: dict[str, Mapping[str, Any]] = {}
    known: list[float] = []
    for request in requests:
        reply = endpoint.cached(request)
        if reply is None:
            new[str(endpoint._path(request))] = request
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
