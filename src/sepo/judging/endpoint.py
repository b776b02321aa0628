"""Chat completions of any OpenAI-compatible server: cached by content and counted.

Paid replies must neither be lost nor be paid twice. So every reply is written to disk before anything else happens with
it, under a digest of its request, and the same question is asked once: in this run, in the next one and from another
folder. A whole reply without an answer was paid for too: it is kept, and the caller counts it. So is a refusal of a
question (too long), once the server answers others. Only a question without a whole reply (429, 5xx, a broken
connection, a server that hangs) is asked again, after a growing pause. A question that fails every time is not cached,
so the same command asks it again.

The key comes from an environment variable, is sent to one address in one header (redirects are not followed), never
over plain http to another machine, and is removed from every text of the server.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from sepo.bars import progress_bar
from sepo.errors import UserError, check_number, one_line
from sepo.files import digest, expand_home, write_json
from sepo.judging.replies import REFUSED_TEXT, UNANSWERED, Reply, Spent, read_reply, refusal
from sepo.processes import log_once

# The two names of the length limit.
LENGTH_NAMES = ("max_tokens", "max_completion_tokens")
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
# Names of headers, of fields of a request and of parts of an address whose value is a secret.
_SECRET = re.compile(
    r"api[-_]?key|subscription[-_]key|authori[sz]ation|secret|passw|cookie|credential|(^|[-_])auth([-_]|$)"
    r"|(^|access|auth|bearer|session|security|private|^x)[-_]?token$",
    re.IGNORECASE,
)
KEY_VARIABLE, KEY_HEADER = "OPENAI_API_KEY", "Authorization"


@dataclass(frozen=True)
class Endpoint:
    """A model behind a server.

    Attributes:
        url: up to and including the version, such as `http://localhost:8000/v1`.
        model: its name there.
        key_variable: environment variable with the key; it may be unset.
        key_header: header that holds the key; "Authorization" holds `Bearer KEY`, another one the key alone.
        headers: further headers of every request.
        more: further fields of every request, such as `{"top_p": 1}`; None removes a field.
        concurrency: number of simultaneous requests.
        timeout: seconds that a request may take in all.
        retries: how often a question without a reply is asked again.
        cache: folder of the replies; None for `$SEPO_CACHE/replies`, else `~/.cache/sepo/replies`.
        retry_malformed: ask again where the reply on disk is no answer.
    """

    url: str
    model: str
    key_variable: str = KEY_VARIABLE
    key_header: str = KEY_HEADER
    headers: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
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
            shown = one_line(re.sub("//.*@", "//...@", self.url), 100)
            raise UserError(f"the server '{shown}' is no address: expected http://HOST:PORT/v1, no key in it")
        if not self.model:
            raise UserError("a server needs the name of the model to ask: --model-name (recipe: eval.judge.model)")
        check_number("concurrency", self.concurrency, whole=True, least=1, most=1024)
        check_number("timeout", self.timeout, above=0, most=86_400)
        check_number("retries", self.retries, whole=True, least=0, most=100)
        if not self._key.isascii() or not self._key.isprintable():
            raise UserError(f"${self.key_variable} holds characters that no key has: set it again, without line ends")
        for name, value in {**self.headers, self.key_header: ""}.items():
            if not _HEADER.fullmatch(name) or not value.isascii() or not value.isprintable():
                raise UserError(
                    f"the header '{one_line(name, 60)}' cannot be sent: expected a name and a line of ASCII"
                )
        self._check_no_secrets()
        if importlib.util.find_spec("openai") is None:
            raise UserError(f'the server {self.url} needs the package openai: run `pip install -e ".[judge]"`')

    def _check_no_secrets(self) -> None:
        """Refuse a key outside of its variable: it would be written into results, and sent over plain http."""
        query = [name for name, _ in parse_qsl(urlsplit(self.url).query, keep_blank_values=True)]
        named = {
            "part of the address": [name for name in query if name in ("key", "code", "sig") or _SECRET.search(name)],
            "field of a request": filter(_SECRET.search, self.more),
            "header": [
                name
                for name, value in self.headers.items()
                if _SECRET.search(name) or value.lower().startswith(("bearer ", "basic "))
            ],
        }
        for kind, names in named.items():
            for name in names:
                raise UserError(
                    f"the {kind} '{one_line(name, 60)}' seems to hold a key: put the key into an environment variable, "
                    "and name that with --key-variable and its header with --key-header (recipe: key_variable, "
                    "key_header)"
                )

    @property
    def _key(self) -> str:
        """The key; empty without one, and where plain http would show it to others."""
        return os.environ.get(self.key_variable, "") if self._is_private else ""

    @property
    def _is_private(self) -> bool:
        """Is the way to the server encrypted, or within this machine?"""
        parts = urlsplit(self.url)
        host = str(parts.hostname)
        if parts.scheme == "https" or host == "localhost":
            return True
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    def _all_headers(self) -> dict[str, str]:
        if not self._key:
            return dict(self.headers)
        bearer = "Bearer " if self.key_header.lower() == "authorization" else ""
        return {**self.headers, self.key_header: bearer + self._key}

    def log_key(self) -> None:
        """Log where the key goes, once."""
        parts = urlsplit(self.url)
        if self._key:
            log_once(f"the key in ${self.key_variable} goes to {parts.scheme}://{parts.netloc}")
        elif os.environ.get(self.key_variable) and not self._is_private:
            log_once(
                f"the key in ${self.key_variable} is not sent to {parts.scheme}://{parts.netloc}, because plain http "
                "would show it to others: use https, or a tunnel to localhost"
            )

    @property
    def cache_folder(self) -> Path:
        """The folder of the replies."""
        if self.cache is not None:
            return Path(expand_home(self.cache, "the cache of replies"))
        return Path(expand_home(os.environ.get("SEPO_CACHE") or "~/.cache/sepo", "the cache")) / "replies"

    def request(self, messages: Sequence[Mapping[str, str]], **settings: Any) -> dict[str, Any]:
        """The body of a question; `settings` are the server's (temperature, max_tokens, seed, logprobs, ...)."""
        body = {"model": self.model, "messages": [dict(message) for message in messages], **settings, **self.more}
        return {name: value for name, value in body.items() if value is not None}

    def cached(self, request: Mapping[str, Any]) -> Reply | None:
        """The reply on disk to a question; None without one, or if its file is damaged."""
        try:
            stored = json.loads(self._path(request).read_text(encoding="utf-8"))
            if stored["request"] != request:
                return None
            if not {"choices", "refused"} & stored["reply"].keys():
                return None  # older versions kept broken bodies too
            reply = read_reply(stored["reply"])._replace(seconds=float(stored["seconds"]), cached=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return None if self.retry_malformed and reply.failure else reply

    def _path(self, request: Mapping[str, Any]) -> Path:
        # The address is part of the digest: a model called "default" is another one elsewhere.
        name = digest({"url": self.url.rstrip("/"), "request": request})
        return self.cache_folder / name[:2] / f"{name}.json"

    def _keep(self, request: Mapping[str, Any], stored: Mapping[str, Any], seconds: float) -> Reply:
        """Write a reply to disk, then read it."""
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
                self._ask_new([requests[numbers[0]] for numbers in new], lambda i, reply: take(new[i], reply), spent)
        spent.elapsed = time.monotonic() - began
        return replies, spent

    def _ask_new(self, requests: Sequence[Mapping[str, Any]], take: Callable[[int, Reply], None], spent: Spent) -> None:
        """Ask questions that have no reply on disk. A refusal is stored once the server answers other questions."""
        from sepo.judging.client import Client

        self.log_key()
        answers = spent.cached > spent.refused
        refused: list[tuple[Mapping[str, Any], Reply]] = []

        def take_new(number: int, reply: Reply) -> None:
            nonlocal answers
            answers = answers or reply.answered
            if reply.refused:
                refused.append((requests[number], reply))
            for refused_one in list(refused):
                if answers or str(refused_one[1].failure).startswith(REFUSED_TEXT):
                    self._keep(refused_one[0], refusal(refused_one[1]), 0.0)
                    refused.remove(refused_one)
            take(number, reply)

        client = Client(
            self.url,
            self._key,
            headers=self._all_headers(),
            concurrency=self.concurrency,
            timeout=self.timeout,
            retries=self.retries,
            keep=self._keep,
        )
        try:
            client.ask_all(requests, take_new, answers)
        finally:
            spent.retried = client.sent - len(requests)


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
    completion = sum(int(request.get(name) or 0) for request in new.values() for name in LENGTH_NAMES)
    each = sum(known) / len(known) if known else seconds_each
    spent = Spent(prompt_tokens=characters // 4 + 8 * len(new), completion_tokens=completion)
    return CallEstimate(
        len(new), len(known), spent.prompt_tokens, completion,
        len(new) * each / endpoint.concurrency, None if prices is None else spent.cost(prices),
    )  # fmt: skip
