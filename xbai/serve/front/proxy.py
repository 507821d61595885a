"""Passes a request on to a copy of the service, and the copy's answer back as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from xbai.client.pool import CONNECT_TIMEOUT_S, retry_after_s
from xbai.client.replicas import Replica, Replicas
from xbai.serve.disconnect import client_gone, until_disconnected
from xbai.serve.errors import ServiceError
from xbai.serve.front.work import Work, work_of
from xbai.serve.limits import RETRY_AFTER_S, Admission, Limits
from xbai.serve.openai.sse import event

HOP_BY_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"),
        *("transfer-encoding", "upgrade", "expect", "content-length"),
    }
)
"""Headers of a connection, not of a request (RFC 9110, section 7.6.1), and those that the client library writes."""
GIVEN_TO_REQUESTS = frozenset(("x-request-id", "x-forwarded-for"))
GIVEN_TO_ANSWERS = frozenset(("x-request-id", "date", "server"))
"""Headers that the front writes anyway."""
SLACK_S = 30.0
"""A copy that is so much later than its own time-out hangs."""
EVENT_END = b"\n\n"


class Proxy:
    """The ASGI application of every path that is the copies' to answer."""

    def __init__(
        self,
        replicas: Replicas,
        client: httpx.AsyncClient,
        admission: Admission,
        limits: Limits,
        default_effort: str | None = None,
    ) -> None:
        self._replicas = replicas
        self._client = client
        self._admission = admission
        self._default_effort = default_effort
        # A stream shows that it is alive; other answers may take as long as the copy lets them.
        read_s = limits.request_timeout_s + SLACK_S
        self._timeout = httpx.Timeout(read_s, connect=CONNECT_TIMEOUT_S, pool=None).as_dict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Raises:
            ServiceError: 503 where no copy is ready or its copy has died, 429 where all are full; 404 for what is no
                path; 499 (which nobody reads) after a disconnect.
        """
        with self._admission.admit(1):
            try:
                body = await Request(scope, receive).body()
            except ClientDisconnect:
                raise client_gone() from None
            work = work_of(scope["method"], body, self._default_effort)
            begun = False

            async def send_noted(message: Message) -> None:
                nonlocal begun
                begun = True
                await send(message)

            if not await _while_connected(self._pass_on(scope, body, work, send_noted), receive) and not begun:
                raise client_gone()

    async def _pass_on(self, scope: Scope, body: bytes, work: Work, send: Send) -> None:
        """To one copy after another, until one takes it: what a copy has begun to work on is asked of no other."""
        tried: set[str] = set()
        refusal: Response | None = None
        while True:
            with self._replicas.borrow(work.weight, work.beginning, tried) as replica:
                if replica is None:
                    break
                tried.add(replica.base_url)
                try:
                    answer = await self._client.send(self._request(replica, scope, body), stream=True)
                except (httpx.ConnectError, httpx.ConnectTimeout):
                    replica.failed(_now(), answered=False)
                    continue
                except httpx.TransportError:
                    raise _broken(replica) from None
                async with aclosing(answer):
                    if not _is_refused(replica, answer):
                        await _forward(replica, answer, scope, send)
                        return
                    refusal = await _whole(replica, answer)
        await (refusal or self._no_room().to_response(scope["path"]))(scope, _never, send)

    def _request(self, replica: Replica, scope: Scope, body: bytes) -> httpx.Request:
        left_out = {*HOP_BY_HOP, *GIVEN_TO_REQUESTS, *_named_by_connection(scope["headers"])}
        headers = [(name, value) for name, value in scope["headers"] if name.decode("latin-1") not in left_out]
        headers.append((b"x-request-id", scope["state"]["request_id"].encode()))
        if scope["client"] is not None:
            # The copies' queues give each client its turn.
            headers.append((b"x-forwarded-for", scope["client"][0].encode()))
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        try:
            url = httpx.URL(replica.base_url, raw_path=target)
        except httpx.InvalidURL:
            raise ServiceError(404, "Not Found") from None
        extensions = {"timeout": self._timeout}
        return httpx.Request(scope["method"], url, headers=headers, content=body, extensions=extensions)

    def _no_room(self) -> ServiceError:
        if any(not replica.failures for replica in self._replicas.all):
            return ServiceError(429, "all copies of the model are full", RETRY_AFTER_S)
        return ServiceError(503, "no copy of the model is ready", RETRY_AFTER_S)


def _is_refused(replica: Replica, answer: httpx.Response) -> bool:
    """Whether it has not begun to work on the request; also tells the copy's books how it is."""
    if answer.status_code == 429:
        replica.refused(_now(), retry_after_s(answer))
    elif answer.status_code == 503:
        replica.failed(_now(), answered=False)
    else:
        replica.succeeded()
        return False
    return True


async def _forward(replica: Replica, answer: httpx.Response, scope: Scope, send: Send) -> None:
    """The answer as it comes where it is a stream of events; any other once it is whole, so that none is cut short."""
    if not answer.headers.get("content-type", "").startswith("text/event-stream"):
        await (await _whole(replica, answer))(scope, _never, send)
        return
    await send({"type": "http.response.start", "status": answer.status_code, "headers": _headers(answer)})
    try:
        async for events in _whole_events(answer):
            await send({"type": "http.response.body", "body": events, "more_body": True})
    except httpx.TransportError:
        last = event(_broken(replica).to_openai()).encode()
        await send({"type": "http.response.body", "body": last, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _whole_events(answer: httpx.Response) -> AsyncIterator[bytes]:
    """Of a stream that breaks off in the middle of an event, this event is left out."""
    begun = b""
    async for chunk in answer.aiter_raw():
        ended, end, begun = (begun + chunk).rpartition(EVENT_END)
        if end:
            yield ended + end
    if begun:
        yield begun


async def _whole(replica: Replica, answer: httpx.Response) -> Response:
    try:
        content = b"".join([chunk async for chunk in answer.aiter_raw()])
    except httpx.TransportError:
        raise _broken(replica) from None
    response = Response(content, answer.status_code)
    response.raw_headers = _headers(answer)
    response.headers.setdefault("content-length", str(len(content)))
    return response


def _headers(answer: httpx.Response) -> list[tuple[bytes, bytes]]:
    given = [(name.lower(), value) for name, value in answer.headers.raw]
    left_out = {*HOP_BY_HOP, *GIVEN_TO_ANSWERS, *_named_by_connection(given)} - {"content-length"}
    return [(name, value) for name, value in given if name.decode("latin-1") not in left_out]


def _named_by_connection(headers: list[tuple[bytes, bytes]]) -> set[str]:
    values = [value.decode("latin-1") for name, value in headers if name == b"connection"]
    return {name.strip().lower() for value in values for name in value.split(",")}


def _broken(replica: Replica) -> ServiceError:
    """Its books say that it failed, unless it has ended: then it is in none any more."""
    replica.failed(_now(), answered=False)
    return ServiceError(503, "the copy of the model that had this request has failed", RETRY_AFTER_S)


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _while_connected(work: Coroutine[Any, Any, None], receive: Receive) -> bool:
    """Do it; cancel it when the client leaves. Whether it was done."""
    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(until_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return False
        task.result()
        return True
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.wait({task})


async def _never() -> Any:
    """A `receive` for answers that read nothing."""
    raise RuntimeError("nothing is to be received")
