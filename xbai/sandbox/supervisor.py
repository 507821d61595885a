"""Running one job: a process for the program, and an eye on it until it has ended."""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import CodeType

from xbai.sandbox.confine import Walls
from xbai.sandbox.forking import fork
from xbai.sandbox.job import Job, Limits, Outcome, Status
from xbai.sandbox.notifications import HeldCalls
from xbai.sandbox.program import DONE, OUT_OF_MEMORY, Channels, run_in_this_process

_STATUS_OF_EXIT = {
    DONE: Status.DONE,
    OUT_OF_MEMORY: Status.MEMORY,
    -signal.SIGXCPU: Status.TIME,
    # The kernel's own, at the hard limit on processor time.
    -signal.SIGKILL: Status.TIME,
}
_LOOK_S = 0.05
_CHUNK_BYTES = 2**16


class OwnerEndedError(Exception):
    """Nobody waits for the outcome any more."""


def run(job: Job, preamble: CodeType, walls: Walls, owner_fd: int) -> Outcome:
    """Run a job to its end, or to its limits.

    Args:
        job: what to run.
        preamble: of `compile_preamble`.
        walls: around the program.
        owner_fd: a socket whose other end closes when its owner ends.

    Raises:
        OwnerEndedError: that has happened.
    """
    input_fd = os.memfd_create("stdin")
    with os.fdopen(os.dup(input_fd), "wb") as stream:
        stream.write(job.stdin.encode(errors="replace"))
    os.lseek(input_fd, 0, os.SEEK_SET)
    read_end, write_end = os.pipe()
    ours, theirs = socket.socketpair()
    supervisor, child = os.getpid(), fork()
    if child == 0:
        run_in_this_process(job, preamble, walls, Channels(input_fd, write_end, theirs.fileno()), supervisor)
    os.close(write_end)
    theirs.close()
    return _Watch(child, read_end, _receive_calls(ours), owner_fd, job.limits).outcome()


def _receive_calls(control: socket.socket) -> HeldCalls | None:
    """What the child hands over before the program starts; None where it closes its end without."""
    with control:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
    return HeldCalls(descriptors[0]) if descriptors else None


class _Watch:
    """A running program.

    It must never be waited for by a call that it can hold up: it has the other end of its output too, and may take back
    what it wrote.
    """

    def __init__(self, child: int, output_fd: int, calls: HeldCalls | None, owner_fd: int, limits: Limits) -> None:
        self._child, self._output_fd, self._calls, self._owner_fd = child, output_fd, calls, owner_fd
        self._limits, self._deadline = limits, time.monotonic() + limits.wall_s
        self._output, self._poll = bytearray(), select.poll()
        os.set_blocking(output_fd, False)
        self._poll.register(output_fd, select.POLLIN)
        # Without a flag it is told of the other end's closing alone.
        self._poll.register(owner_fd, 0)
        if calls is not None:
            self._poll.register(calls.descriptor, select.POLLIN)

    def outcome(self) -> Outcome:
        """Wait for the end, or bring it about."""
        while (ended := os.waitpid(self._child, os.WNOHANG))[0] == 0:
            overstepped = self._look() or self._overstepped()
            if overstepped:
                os.kill(self._child, signal.SIGKILL)
                os.waitpid(self._child, 0)
                return Outcome(overstepped, b"")
        while self._read():
            pass
        if len(self._output) > self._limits.output_bytes:
            return Outcome(Status.OUTPUT, b"")
        status = _STATUS_OF_EXIT.get(os.waitstatus_to_exitcode(ended[1]), Status.ERROR)
        return Outcome(status, bytes(self._output))

    def _look(self) -> Status | None:
        """Take what there is of output and of threads to be begun; the latter may be too many."""
        events = dict(self._poll.poll(_LOOK_S * 1000))
        if self._owner_fd in events:
            raise OwnerEndedError
        if self._output_fd in events and not self._read():
            # It is about to end, or closed its output to look as if.
            time.sleep(0.001)
        if self._calls is None or self._calls.descriptor not in events:
            return None
        if events[self._calls.descriptor] & select.POLLIN:
            if self._threads() >= self._limits.threads:
                return Status.THREADS
            self._calls.let_pass()
        else:
            # No thread of it is left.
            self._poll.unregister(self._calls.descriptor)
        return None

    def _read(self) -> bool:
        """Take some output; whether there was any."""
        with suppress(BlockingIOError):
            chunk = os.read(self._output_fd, _CHUNK_BYTES)
            self._output += chunk
            return bool(chunk)
        return False

    def _overstepped(self) -> Status | None:
        """A limit that the kernel does not watch."""
        if len(self._output) > self._limits.output_bytes:
            return Status.OUTPUT
        if time.monotonic() > self._deadline:
            return Status.TIME
        return Status.THREADS if self._calls is None and self._threads() > self._limits.threads else None

    def _threads(self) -> int:
        try:
            return sum(1 for _ in Path(f"/proc/{self._child}/task").iterdir())
        except (FileNotFoundError, ProcessLookupError):
            return 0
