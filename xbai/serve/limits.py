"""What bounds a request: the queue, the clock, the client's patience and the size of the body."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request

from xbai.serve.errors import ServiceError

T = TypeVar("T")

RETRY_AFTER_S = 2
CLIENT_CLOSED_REQUEST = 499


@dataclass(frozen=True)
class Limits:
    """How much a service takes on, and from whom.

    Attributes:
        max_pending: responses (policy) or texts (score) accepted and not yet answered; beyond it, 429.
        request_timeout_s: longest time to an answer; beyond it, 504.
        max_body_bytes: largest request body; beyond it, 413.
        max_bodies_bytes: bodies of all requests that are not yet answered; beyond it, 429.
        shutdown_timeout_s: how long running work may take after SIGTERM.
        receive_timeout_s: longest time to receive a request's body; beyond it, 408. Its head has `HEAD_TIMEOUT_S`.
        api_key: what clients must send as `Authorization: Bearer`; None asks for nothing.
    """

    max_pending: int = 4096
    request_timeout_s: float = 3600.0
    max_body_bytes: int = 16 << 20
    max_bodies_bytes: int = 256 << 20
    shutdown_timeout_s: float = 60.0
    receive_timeout_s: float = 60.0
    api_key: str | None = None


class Admission:
    """Counts the items accepted and unanswered. Used from the event loop only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.pending = 0
        self.closed = False

    @contextmanager
    def admit(self, items: int) -> Iterator[None]:
        """Hold `items` places while the block runs. A request larger than the limit is taken when nothing else waits.

        Raises:
            ServiceError: 429 when the queue is full, 503 when the service is stopping.
        """
        if self.closed:
            raise ServiceError(503, "the service is stopping", RETRY_AFTER_S)
        if self.pending and self.pending + items > self._limit:
            raise ServiceError(429, f"the queue is full ({self.pending} of {self._limit} pending)", RETRY_AFTER_S)
        self.pending += items
        try:
            yield
        finally:
            self.pending -= items


async def _until_disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def answer_in_time(request: Request, work: Awaitable[T], timeout_s: float, end: asyncio.Future[None]) -> T:
    """Await `work`; cancel it when the client goes away, the time is up, or `end` is done.

    Raises:
        ServiceError: 504 after `timeout_s`; 503 at `end`; 499 (which nobody reads) after a disconnect.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_until_disconnected(request))
    try:
        await asyncio.wait({task, watcher, end}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if watcher.done():
            raise ServiceError(CLIENT_CLOSED_REQUEST, "the client closed the connection")
        if end.done():
            raise ServiceError(503, "the service stopped before the answer", RETRY_AFTER_S)
        raise ServiceError(504, f"no answer within {timeout_s:g} s")
    finally:
        task.cancel()
        watcher.cancel()
