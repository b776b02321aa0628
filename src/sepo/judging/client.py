"""Questions to a server through the `openai` client, which retries and waits.

This file adds four things. A request has a limit on its total time and size, because the client's timeouts restart
with every byte. A body that is no whole chat completion counts as the HTTP status that it stands for (`replies.py`). A
reply is stored as soon as it is complete. After an interruption or an error, the requests under way are still awaited,
because they are paid for, and no further request is sent.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import ssl
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import anyio
import httpx2
import openai
from anyio import to_thread
from anyio.from_thread import start_blocking_portal

from sepo.errors import UserError, one_line
from sepo.judging.endpoint import LENGTH_NAMES
from sepo.judging.replies import (
    REFUSED,
    REFUSED_TEXT,
    UNANSWERED,
    NoCompletion,
    Reply,
    completion_of,
    is_of_account,
    is_of_question,
    message_in,
)
from sepo.processes import log

MOST_BYTES = 16 * 2**20  # a longer reply is no answer
_ENDS_ALL = {
    401: "refuses the key", 402: "wants a payment", 403: "refuses the key", 404: "knows no such path or model",
}  # fmt: skip
_KEY_HINT = ": --key-variable names its variable, --key-header its header (Azure: api-key)"
# Statuses below 500 that waiting may mend.
_MAY_HEAL = (408, 409, 425, 429)
_FEW_REFUSED = 4
# A server that refuses one name of the length limit in such words gets the other.
_UNKNOWN = re.compile(
    r"un(supported|recogni[sz]ed|known|expected)|not (supported|permitted|allowed)|extra|instead", re.I
)
# Stores a whole chat completion: from its request, the completion and its duration in seconds.
Keep = Callable[[Mapping[str, Any], Mapping[str, Any], float], Reply]


class Client:
    """A connection to a server.

    Attributes:
        sent: number of requests so far, repetitions included.
    """

    def __init__(
        self, url: str, key: str, *, headers: Mapping[str, str], concurrency: int, timeout: float, retries: int,
        keep: Keep,
    ):  # fmt: skip
        """
        Args:
            url: up to and including the version.
            key: empty for a server without one; removed from every text of the server.
            headers: of every request, with the one that holds the key.
        """
        parts = urlsplit(url)
        self._url, self._key, self._concurrency, self._timeout = url, key, concurrency, timeout
        # The client would add headers from the environment, for any server.
        named = [line.partition(":")[0].strip() for line in os.environ.get("OPENAI_CUSTOM_HEADERS", "").splitlines()]
        unsent = ("Authorization", "OpenAI-Organization", "OpenAI-Project", *filter(None, named))
        self._headers: dict[str, str | openai.Omit] = {**dict.fromkeys(unsent, openai.Omit()), **headers}
        self._transport = _Transport(parts.scheme == "https", timeout, keep, self._text_of)
        self._client = openai.AsyncOpenAI(
            base_url=parts._replace(query="").geturl(),
            default_query=dict(parse_qsl(parts.query)),
            api_key="none",  # without a key the client would look for one in the environment
            max_retries=retries,
            timeout=timeout,
            default_headers={"Accept-Encoding": "identity"},  # a small compressed reply could grow without bound
            # The key goes to this address only: neither to the target of a redirect nor through a proxy.
            http_client=httpx2.AsyncClient(transport=self._transport, follow_redirects=False, trust_env=False),
        )

    @property
    def sent(self) -> int:
        return self._transport.sent

    def ask_all(
        self, requests: Sequence[Mapping[str, Any]], take: Callable[[int, Reply], None], answers: bool = False
    ) -> None:
        """Ask all questions; call `take` in this thread with the number and the reply of each as it comes.

        Args:
            answers: the server is known to answer such requests.

        Raises:
            UserError: the server refuses the key or every question, knows no such model, or has stopped answering.
        """
        waiting = iter(enumerate(requests))
        under_way: dict[Future[Reply], int] = {}
        silent = refused = 0  # questions in a row without a reply; questions refused before the first answer
        # The event loop runs in another thread, because this one may have a loop already, as in a notebook. An error
        # cancels all questions here, but the requests under way are shielded and awaited.
        with start_blocking_portal() as portal:
            try:
                while True:
                    for number, request in itertools.islice(waiting, self._concurrency - len(under_way)):
                        under_way[portal.start_task_soon(self._ask, request)] = number
                    if not under_way:
                        break
                    for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                        reply = future.result()
                        silent = silent + 1 if reply.unanswered else 0
                        answers = answers or reply.answered
                        refused += reply.refused and not str(reply.failure).startswith(REFUSED_TEXT)
                        if silent > 2 * self._concurrency + 3:
                            raise UserError(
                                f"the server {self._url} has stopped answering ({one_line(reply.failure, 150)}): the "
                                "replies so far are kept; the same command asks for the rest"
                            )
                        if refused >= min(len(requests), self._concurrency + _FEW_REFUSED) and not answers:
                            raise UserError(
                                f"the server {self._url} refuses every question ({one_line(reply.failure, 300)}): "
                                "change the model, the prompt, or the request (--max-tokens, --temperature none, "
                                "--no-logprobs, --request name=value; a recipe has the same settings)"
                            )
                        take(under_way.pop(future), reply)
            except KeyboardInterrupt:
                if under_way:
                    log(
                        f"waiting at most {self._timeout:g} s for {len(under_way)} replies under way, which are kept; "
                        "Ctrl-C again stops at once"
                    )
                raise

    async def _ask(self, request: Mapping[str, Any]) -> Reply:
        try:
            response = await self._client.post(
                "/chat/completions",
                cast_to=httpx2.Response,
                content=json.dumps(request).encode(),  # ASCII, because a text may hold half of a surrogate pair
                options={"headers": self._headers},
            )
            return response.extensions["reply"]
        except openai.APIStatusError as error:
            if ends := error.response.extensions.get("ends"):
                raise UserError(f"the server {self._url} {ends}") from None
            text, status = error.response.text, error.status_code
            words = "" if error.response.extensions.get("inside") else f"HTTP {status} "
            words = (words + (one_line(message_in(text), 200) if text.strip() else "")).rstrip()
            if is_of_question(status, text):
                return Reply("", failure=f"{REFUSED_TEXT}: {words}")
            if status in _ENDS_ALL:
                hint = _KEY_HINT if "key" in _ENDS_ALL[status] else ""
                raise UserError(f"the server {self._url} {_ENDS_ALL[status]} ({words}){hint}") from None
            if status == 429 and "insufficient_quota" in text:
                raise UserError(f"the server {self._url} has no quota left for the key ({words})") from None
            if is_of_account(status, text):
                raise UserError(f"the server {self._url} refuses the key or its account ({words}){_KEY_HINT}") from None
            kind = REFUSED if 400 <= status < 500 and status not in _MAY_HEAL else UNANSWERED
            return Reply("", failure=f"{kind}: {words}")
        except openai.APIConnectionError as error:
            reason = _reason(error)
            return Reply("", failure=f"{UNANSWERED}: {one_line(f'{type(reason).__name__} {reason}', 120)}")

    def _text_of(self, response: httpx2.Response, body: bytes) -> str:
        """The text of a reply, without the key.

        Raises:
            NoCompletion: a reply with a status of success is no text in its encoding.
        """
        charset = re.search(r"charset=[\"']?([\w.:-]+)", response.headers.get("Content-Type", ""))
        for encoding in (charset[1] if charset else "utf-8", "utf-8"):
            try:
                text = body.decode(encoding)
                break
            except (LookupError, ValueError):
                continue
        else:
            if response.is_success:
                raise NoCompletion(502, "the reply is not UTF-8")
            text = body.decode("utf-8", "replace")
        return text.replace(self._key, "[key]") if self._key else text


class _Transport(httpx2.AsyncHTTPTransport):
    """Sends one request and reads its whole reply."""

    def __init__(
        self, encrypted: bool, timeout: float, keep: Keep, text_of: Callable[[httpx2.Response, bytes], str]
    ):  # fmt: skip
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        # Plain http needs no certificates, whose reading takes 30 ms: redirects, to https for one, are not followed.
        super().__init__(verify=encrypted, limits=limits)
        self.sent, self._timeout, self._keep, self._text_of = 0, timeout, keep, text_of
        self._length_name: str | None = None  # the name that this server knows, once it refused the other

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        began = time.monotonic()
        extensions: dict[str, Any] = {}
        with anyio.CancelScope(shield=True):  # an interruption cancels only the pauses between requests
            asked = json.loads(request.content)
            try:
                response, body = await self._send(self._renamed(request, asked))
                if response.status_code in (400, 422) and (
                    name := _other_length_name(asked, self._text_of(response, body))
                ):
                    self._length_name = name
                    response, body = await self._send(self._renamed(request, asked))
            except httpx2.ConnectError as error:
                if (ends := _never_connects(error)) is None:
                    raise
                no_retry = {"x-should-retry": "false"}
                return httpx2.Response(495, headers=no_retry, request=request, extensions={"ends": ends})
            status = response.status_code
            try:
                text = self._text_of(response, body)
                if response.is_success:
                    stored = completion_of(text)
                    # In a thread, because flushing a file to disk takes milliseconds.
                    seconds = time.monotonic() - began
                    extensions["reply"] = await to_thread.run_sync(self._keep, asked, stored, seconds)
            except NoCompletion as error:
                status, text, extensions["inside"] = error.status, str(error), True
        headers = {name: value for name in _OF_RETRIES if (value := response.headers.get(name, "")).isascii() and value}
        if response.has_redirect_location:
            text = f"redirects to {response.headers['Location']}: give that address as the server"
        if response.has_redirect_location or (
            "insufficient_quota" in text if status == 429 else is_of_question(status, text)
        ):
            headers["x-should-retry"] = "false"
        return httpx2.Response(status, headers=headers, content=text.encode("utf-8", "replace"), extensions=extensions)

    def _renamed(self, request: httpx2.Request, asked: Mapping[str, Any]) -> httpx2.Request:
        """The request with the name of the length limit that the server knows."""
        if self._length_name is None:
            return request
        body = {self._length_name if name in LENGTH_NAMES else name: value for name, value in asked.items()}
        headers = [(name, value) for name, value in request.headers.items() if name.lower() != "content-length"]
        return httpx2.Request(
            request.method, request.url, headers=headers, content=json.dumps(body).encode(),
            extensions=request.extensions,
        )  # fmt: skip

    async def _send(self, request: httpx2.Request) -> tuple[httpx2.Response, bytes]:
        self.sent += 1
        body = bytearray()
        try:
            with anyio.fail_after(self._timeout):
                response = await super().handle_async_request(request)
                async for part in response.aiter_raw():
                    body += part
                    if len(body) > MOST_BYTES:
                        return response, _TOO_LONG
                await response.aclose()
        except TimeoutError:
            raise httpx2.ReadTimeout(f"no whole reply in {self._timeout:g} s", request=request) from None
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and len(body) < int(length):
            raise httpx2.ReadError(f"the reply broke off after {len(body)} of {length} bytes", request=request)
        encoding = response.headers.get("Content-Encoding", "").lower()
        if encoding in ("gzip", "deflate"):
            try:
                body = bytearray(zlib.decompressobj(47).decompress(bytes(body), MOST_BYTES + 1))
            except zlib.error as error:
                raise httpx2.ReadError(f"the reply cannot be decompressed ({error})", request=request) from None
        elif encoding not in ("", "identity"):
            raise httpx2.ReadError(f"the reply is compressed as {encoding}", request=request)
        return response, bytes(body) if len(body) <= MOST_BYTES else _TOO_LONG


_TOO_LONG = b'{"choices": [], "unreadable": "longer than 16 MiB"}'
# Headers that the client reads; others may hold anything.
_OF_RETRIES = ("retry-after", "retry-after-ms", "x-should-retry")


def _other_length_name(asked: Mapping[str, Any], text: str) -> str | None:
    """The other name of the length limit, if the server says that it does not know the name in the request."""
    for name, other in (LENGTH_NAMES, LENGTH_NAMES[::-1]):
        if name in asked and re.search(rf"\b{name}\b", text) and _UNKNOWN.search(text):
            return other
    return None


def _never_connects(error: BaseException) -> str | None:
    """Why waiting cannot mend a connection: the server's certificate, or a server without TLS."""
    reason = _reason(error, ssl.SSLError)
    if isinstance(reason, ssl.SSLCertVerificationError):
        words = one_line(reason.verify_message or reason, 120)
        return (
            f"has a certificate that is not trusted ({words}): if you trust it, put its PEM file, or that of its "
            "authority, into the environment variable SSL_CERT_FILE"
        )
    if isinstance(reason, ssl.SSLError) and reason.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
        return "does not speak https: try http://"
    return None


def _reason(error: BaseException, kind: type[OSError] = OSError) -> BaseException:
    """The operating system's error behind an error of the client, such as a refused connection; else the cause."""
    reason = error.__cause__ or error
    inner: BaseException | None = reason
    while inner is not None:
        if isinstance(inner, kind) and inner.errno is not None:
            reason = inner
        inner = inner.__cause__ or inner.__context__
    return reason
