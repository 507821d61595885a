"""What bounds the requests of a service."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from xbai.serve.errors import ServiceError
from xbai.serve.options import ServiceOptions

RETRY_AFTER_S = 2


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

    @classmethod
    def of(cls, options: ServiceOptions) -> Self:
        """Those of a command line.

        Raises:
            UserError: the file with the API key cannot be read.
        """
        return cls(
            max_pending=options.max_pending,
            request_timeout_s=options.request_timeout,
            max_body_bytes=options.max_body_mb << 20,
            shutdown_timeout_s=options.shutdown_timeout,
            api_key=options.api_key.read(),
        )


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
