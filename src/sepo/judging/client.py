"""Questions to a server through the `openai` client, which retries and waits.

This file adds three things. A request has a limit on its total time and size, because the client's timeouts restart
with every byte. A reply is stored as soon as it is complete. After an interruption or an error, the requests under way
are still awaited, because they are paid for, and no further request is sent.
"""

from __future__ import annotations

import itertools
import json
import time
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
from sepo.judging.replies import UNANSWERED, Reply

MOST_BYTES = 16 * 2**20  # a longer reply is no answer
_ENDS_ALL = {401: "refuses the key", 403: "refuses the key", 404: "knows no such path or model"}
# Stores a reply, from its request, its body and its duration in seconds, and reads it.
Keep = Callable[[Mapping[str, Any], str, float], Reply]


class Client:
    """A connection to a server.

    Attributes:
        sent: number of requests so far, repetitions included.
    """

    def __init__(self, url: str, key: str, *, concurrency: int, timeout: float, retries: int, keep: Keep):
        """
        Args:
            url: up to and including the version.
            key: empty for a server without one.
        """
        parts = urlsplit(url)
        self._url, self._key, self._concurrency = url, key, concurrency
        self._transport = _Transport(timeout, keep, self._text_of)
        self._client = openai.AsyncOpenAI(
            base_url=parts._replace(query="").geturl(),
            default_query=dict(parse_qsl(parts.query)),
            api_key=key or "none",  # without a key the client would look for one in the environment
            max_retries=retries,
            timeout=timeout,
            default_headers={"Accept-Encoding": "identity"},  # a small compressed reply could grow without bound
            # The key goes to this address only: neither to the target of a redirect nor through a proxy.
            http_client=httpx2.AsyncClient(transport=self._transport, follow_redirects=False, trust_env=False),
        )

    @property
    def sent(self) -> int:
        return self._transport.sent

    def ask_all(self, requests: Sequence[Mapping[str, Any]], take: Callable[[int, Reply], None]) -> None:
        """Ask all questions; call `take` in this thread with the number and the reply of each as it comes.

        Raises:
            UserError: the server refuses the key, knows no such model, or has stopped answering.
        """
        waiting = iter(enumerate(requests))
        under_way: dict[Future[Reply], int] = {}
        silent = 0  # questions in a row without a reply
        # The event loop runs in another thread, because this one may have a loop already, as in a notebook. An error
        # cancels all questions here, but the requests under way are shielded and awaited.
        with start_blocking_portal() as portal:
            while True:
                for number, request in itertools.islice(waiting, self._concurrency - len(under_way)):
                    under_way[portal.start_task_soon(self._ask, request)] = number
                if not under_way:
                    return
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    reply = future.result()
                    silent = silent + 1 if reply.unanswered else 0
                    if silent > 2 * self._concurrency + 3:
                        raise UserError(
                            f"the server {self._url} has stopped answering ({one_line(reply.failure, 150)}): the "
                            "replies so far are kept; the same command asks for the rest"
                        )
                    take(under_way.pop(future), reply)

    async def _ask(self, request: Mapping[str, Any]) -> Reply:
        try:
            response = await self._client.post(
                "/chat/completions",
                cast_to=httpx2.Response,
                content=json.dumps(request).encode(),  # ASCII, because a text may hold half of a surrogate pair
                options={} if self._key else {"headers": {"Authorization": openai.Omit()}},
            )
            return response.extensions["reply"]
        except openai.APIStatusError as error:
            text = self._text_of(error.response.content)
            status = f"HTTP {error.status_code} {one_line(text, 120) if text.strip() else ''}".rstrip()
            if error.status_code in _ENDS_ALL:
                raise UserError(f"the server {self._url} {_ENDS_ALL[error.status_code]} ({status})") from None
            return Reply("", failure=f"{UNANSWERED}: {status}")
        except openai.APIConnectionError as error:
            reason = _reason(error)
            return Reply("", failure=f"{UNANSWERED}: {one_line(f'{type(reason).__name__} {reason}', 120)}")

    def _text_of(self, body: bytes) -> str:
        text = body.decode("utf-8", "replace")
        return text.replace(self._key, "[key]") if self._key else text


class _Transport(httpx2.AsyncHTTPTransport):
    """Sends one request and reads its whole reply."""

    def __init__(self, timeout: float, keep: Keep, text_of: Callable[[bytes], str]):
        super().__init__(limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0))
        self.sent, self._timeout, self._keep, self._text_of = 0, timeout, keep, text_of

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.sent += 1
        began = time.monotonic()
        with anyio.CancelScope(shield=True):  # an interruption cancels only the pauses between requests
            response, body = await self._send(request)
            extensions: dict[str, Any] = {}
            if response.is_success:
                text, seconds = self._text_of(body), time.monotonic() - began
                # In a thread, because flushing a file to disk takes milliseconds.
                reply = await to_thread.run_sync(self._keep, json.loads(request.content), text, seconds)
                extensions["reply"] = reply
        return httpx2.Response(response.status_code, headers=response.headers, content=body, extensions=extensions)

    async def _send(self, request: httpx2.Request) -> tuple[httpx2.Response, bytes]:
        body = bytearray()
        try:
            with anyio.fail_after(self._timeout):
                response = await super().handle_async_request(request)
                async for part in response.aiter_raw():
                    body += part
                    if len(body) > MOST_BYTES:
                        body[:] = b'{"error": "longer than 16 MiB"}'
                        break
                await response.aclose()
        except TimeoutError:
            raise httpx2.ReadTimeout(f"no whole reply in {self._timeout:g} s", request=request) from None
        return response, bytes(body)


def _reason(error: BaseException) -> BaseException:
    """The operating system's error behind an error of the client, such as a refused connection; else the cause."""
    reason = error.__cause__ or error
    inner: BaseException | None = reason
    while inner is not None:
        if isinstance(inner, OSError) and inner.errno is not None:
            reason = inner
        inner = inner.__cause__ or inner.__context__
    return reason
