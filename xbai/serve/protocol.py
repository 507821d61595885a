"""HTTP/1.1 for clients that may be slow on purpose."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0


class TimedProtocol(H11Protocol):
    """Closes the connection of a client that neither asks nor reads.

    A whole request head must arrive within `HEAD_TIMEOUT_S` of its beginning, and of an answer that fills the buffers
    some more must be read within every `READ_TIMEOUT_S`. uvicorn itself waits for ever, so that such clients could use
    up all connections, and memory.
    """

    _clock: asyncio.TimerHandle | None = None
    _read_clock: asyncio.TimerHandle | None = None

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
        self._stop_read_clock()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """What the client is to read has filled the buffers; until it has read on, uvicorn adds nothing."""
        super().pause_writing()
        self._start_read_clock()

    def resume_writing(self) -> None:
        """The client has read on."""
        self._stop_read_clock()
        super().resume_writing()

    def _start_read_clock(self) -> None:
        unread = self.transport.get_write_buffer_size()
        self._read_clock = self.loop.call_later(READ_TIMEOUT_S, self._expect_less_than, unread)

    def _expect_less_than(self, unread: int) -> None:
        if self.transport.get_write_buffer_size() < unread:
            self._start_read_clock()
        else:
            self.transport.abort()

    def _stop_read_clock(self) -> None:
        if self._read_clock is not None:
            self._read_clock.cancel()
            self._read_clock = None

    def _start_clock(self) -> None:
        self._clock = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
