"""The HTTP server of a service: take the port, answer until told to stop, leave."""

from __future__ import annotations

import asyncio
import errno
import logging
import multiprocessing
import os
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, Protocol

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from xbai.errors import UserError
from xbai.serve.limits import Limits

if TYPE_CHECKING:
    from fastapi import FastAPI

    from xbai.serve.app import Service

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
LISTEN_BACKLOG = 2048
HEAD_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
SEND_TIMEOUT_S = 5
"""How long clients may take over the last answers, once no more are to come."""


def listen(ip: str, port: int) -> socket.socket:
    """A listening socket: from here on the port is ours, before the slow part begins. `::` is all of IPv4, too.

    Raises:
        UserError: the address cannot be had.
    """
    if not ip:
        raise UserError("--ip '': no address; 127.0.0.1 is this machine alone, 0.0.0.0 all of IPv4, :: that and IPv6")
    try:
        # Of a name that has both, IPv4.
        family = min(family for family, *_ in socket.getaddrinfo(ip, port, type=socket.SOCK_STREAM))
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        if ip == "::" and not both:
            logger.warning("--ip ::: this system has no sockets for both, so that IPv4 is not served")
        return socket.create_server((ip, port), family=family, backlog=LISTEN_BACKLOG, dualstack_ipv6=both)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(f"--ip {ip} --port {port}: cannot listen there ({_why_not(error)})") from None


def _why_not(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    # A resolver's errors have numbers of their own.
    number = None if isinstance(error, socket.gaierror) else error.errno
    if number in (errno.EADDRINUSE, errno.EACCES):
        return f"{os.strerror(number)}; choose another --port"
    reason = error.strerror if number is None else os.strerror(number)
    return f"{reason}; --ip is an address of this machine, 0.0.0.0 all of IPv4, :: that and IPv6"


class TimedProtocol(H11Protocol):
    """Closes the connection of a client that neither asks nor reads.

    A whole request head must arrive within `HEAD_TIMEOUT_S` of its beginning, and of an answer that fills the buffers
    some more must be read within every `READ_TIMEOUT_S`. uvicorn itself waits for ever, so that such clients could use
    up all connections, and memory.
    """

    _clock: asyncio.TimerHandle | None = None
    _read_clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
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
        self._stop_clock()
        self._stop_read_clock()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """What the client is to read has filled the buffers; until it has read on, uvicorn adds nothing."""
        super().pause_writing()
        self._start_read_clock()

    def resume_writing(self) -> None:
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

    def _start_clock(self) -> None:
        self._clock = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None


def server_config(app: ASGIApp) -> uvicorn.Config:
    """How HTTP is spoken."""
    return uvicorn.Config(
        app,
        http=TimedProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=SEND_TIMEOUT_S,
    )


class Stoppable(Protocol):
    """What is served until it has finished."""

    @property
    def limits(self) -> Limits:
        """What bounds its requests."""

    @property
    def stopping(self) -> bool:
        """`stop` was called."""

    def stop(self) -> None:
        """Take no more work. Called from a signal handler."""

    def finished(self) -> bool:
        """There is nothing more to serve. Asked ten times a second, from the event loop."""


class DrainingServer(uvicorn.Server):
    """Answers until the service has finished or a signal comes, and then, for a while, what it had accepted before.

    It keeps listening meanwhile, so that clients and load balancers read that it is stopping.
    """

    def __init__(self, app: ASGIApp, service: Stoppable) -> None:
        super().__init__(server_config(app))
        self._stoppable = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at the first signal, end the process at the second."""
        if self._stoppable.stopping:
            leave(128 + sig)
        logger.info("stopping: at most %g s for what is unanswered", self._stoppable.limits.shutdown_timeout_s)
        self._stoppable.stop()

    async def on_tick(self, counter: int) -> bool:
        """Whether to shut down."""
        return await super().on_tick(counter) or self._stoppable.finished()

    def run_on(self, listener: socket.socket) -> None:
        """Serve on `listener`, and say where that is."""
        host, port = listener.getsockname()[:2]
        logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        self.run(sockets=[listener])


class _Server(DrainingServer):
    """Also ends where its model dies."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        super().__init__(app, service)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As above, but while the model loads the first signal ends it all."""
        thread = self._service.thread
        if not self._service.stopping and thread.alive and not thread.ready:
            logger.info("stopping: nothing is accepted yet, and loading cannot be interrupted")
            leave(0)
        super().handle_exit(sig, frame)


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve on `listener`. Returns after a graceful stop; ends the process with status 1 when the engine died.

    Raises:
        UserError: the model could not be loaded, for a reason the user can mend.
    """
    service: Service = app.state.service
    _Server(app, service).run_on(listener)
    thread = service.thread
    if thread.loading_error is not None:
        raise thread.loading_error
    if thread.error is not None or thread.running:
        # At once: cleaning up a broken engine can take as long as its workers please.
        logger.warning("leaving without cleaning up the model")
        sys.stdout.flush()
        sys.stderr.flush()
        leave(0 if thread.error is None else 1)


def leave(status: int) -> NoReturn:
    """End this process and its workers, which would keep their GPUs if they hang or are still loading."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(status)
