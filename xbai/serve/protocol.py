"""HTTP/1.1 for clients that may be slow on purpose."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 10.0


class BoundedHeadProtocol(H11Protocol):
    """Closes a connection on which no whole request head arrives within `HEAD_TIMEOUT_S` of its beginning.

    uvicorn itself waits for ever, so that clients which send a byte now and then could use up all connections.
    """

    _clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A request is expected at once."""
        super().connection_made(transport)
        self._start_clock()

    def data_received(self, data: bytes) -> None:
        """Part of a request: between requests uvicorn's keep-alive time-out holds, from the first byte on this one."""
        if self._clock is None and self.cycle.response_complete:
            self._start_clock()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is expected any more."""
        self._stop_clock()
        super().connection_lost(exc)

    def _start_clock(self) -> None:
        self._clock = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
