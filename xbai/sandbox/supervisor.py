"""The process behind `Sandbox`: forks one confined child for each job, and has an eye on it until it has ended.

It imports little, and nothing that a submitted program should not see. Children have its memory; so what a job has, its
source, its input and its output, is never in it: the child reads the job, and the output passes through memory that is
given back before the next child is forked.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType

from xbai.sandbox.confine import Walls, hide_memory, python_paths
from xbai.sandbox.forking import fork
from xbai.sandbox.job import Limits, Status
from xbai.sandbox.notifications import let_pass
from xbai.sandbox.program import DONE, OUT_OF_MEMORY, compile_preamble, run_in_this_process

_STATUS_OF_EXIT = {
    DONE: Status.DONE,
    OUT_OF_MEMORY: Status.MEMORY,
    -signal.SIGXCPU: Status.TIME,
    # The kernel's own, at the hard limit on processor time.
    -signal.SIGKILL: Status.TIME,
}
_LOOK_S = 0.05


class OwnerEndedError(Exception):
    """Nobody waits for the outcome any more."""


def main() -> None:
    """Serve the jobs that arrive on file descriptor 0 until the other end closes."""
    connection = Connection(0)
    walls = connection.recv()
    python_paths()
    preamble = compile_preamble()
    hide_memory()
    while True:
        try:
            supervise(connection, connection.recv(), preamble, walls)
        except (EOFError, OwnerEndedError):
            os._exit(0)


def supervise(connection: Connection, limits: Limits, preamble: CodeType, walls: Walls) -> None:
    """Run the job that comes next on `connection` to its end or to its limits, and send its status, the length of its
    output, and the output.

    Raises:
        OwnerEndedError: the other end of the connection has closed.
        EOFError: the child ended before it had read the job.
    """
    read_end, write_end = os.pipe()
    ours, theirs = socket.socketpair()
    supervisor, child = os.getpid(), fork()
    if child == 0:
        run_in_this_process(connection, preamble, walls, write_end, theirs, supervisor)
    os.close(write_end)
    theirs.close()
    with _Output(read_end, limits.output_bytes) as output:
        status = _Watch(child, output, _wait_for_start(ours), connection.fileno(), limits).status()
        output.send(connection, status)


def _wait_for_start(control: socket.socket) -> int | None:
    """Until the child has read the job and stands behind its walls; what it hands over then."""
    with control:
        started, descriptors, _, _ = socket.recv_fds(control, 1, 1)
    if not started:
        raise EOFError("the program's process ended before it began")
    return descriptors[0] if descriptors else None


class _Output:
    """What a program writes into a pipe, in memory of its own that is gone when this is closed.

    The program has the other end too, and may take back what it wrote: reading never blocks.
    """

    def __init__(self, descriptor: int, limit: int) -> None:
        self.descriptor, self.size, self._limit = descriptor, 0, limit
        os.set_blocking(descriptor, False)
        self._memory = mmap.mmap(-1, limit + 1)

    @property
    def is_over_limit(self) -> bool:
        return self.size > self._limit

    def read(self) -> bool:
        """Take what there is now; whether there was any."""
        with memoryview(self._memory) as whole, whole[self.size :] as free:
            try:
                count = os.readv(self.descriptor, [free]) if len(free) else 0
            except BlockingIOError:
                count = 0
        self.size += count
        return count > 0

    def send(self, connection: Connection, status: Status) -> None:
        size = self.size if status is Status.DONE else 0
        connection.send((status, size))
        with memoryview(self._memory) as whole, whole[:size] as rest:
            # Without `send_bytes`, which copies what is short.
            sent = 0
            while sent < size:
                with rest[sent:] as part:
                    sent += os.write(connection.fileno(), part)

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *exception: object) -> None:
        self._memory.close()
        os.close(self.descriptor)


class _Watch:
    """A running program."""

    def __init__(self, child: int, output: _Output, listener: int | None, owner_fd: int, limits: Limits) -> None:
        self._child, self._output, self._listener, self._owner_fd = child, output, listener, owner_fd
        self._limits, self._deadline = limits, time.monotonic() + limits.wall_s
        self._poll = select.poll()
        self._poll.register(output.descriptor, select.POLLIN)
        # Without a flag it is told of the other end's closing alone.
        self._poll.register(owner_fd, 0)
        if listener is not None:
            self._poll.register(listener, select.POLLIN)

    def status(self) -> Status:
        """Wait for the end, or bring it about."""
        try:
            while (ended := os.waitpid(self._child, os.WNOHANG))[0] == 0:
                overstepped = self._look() or self._overstepped()
                if overstepped:
                    os.kill(self._child, signal.SIGKILL)
                    os.waitpid(self._child, 0)
                    return overstepped
        finally:
            if self._listener is not None:
                # From here on such calls fail.
                os.close(self._listener)
        while self._output.read():
            pass
        if self._output.is_over_limit:
            return Status.OUTPUT
        return _STATUS_OF_EXIT.get(os.waitstatus_to_exitcode(ended[1]), Status.ERROR)

    def _look(self) -> Status | None:
        """Take what there is of output and of threads to be begun; the latter may be too many."""
        events = dict(self._poll.poll(_LOOK_S * 1000))
        if self._owner_fd in events:
            raise OwnerEndedError
        if self._output.descriptor in events and not self._output.read():
            # It is about to end, or closed its output to look as if.
            time.sleep(0.001)
        if self._listener is None or self._listener not in events:
            return None
        if events[self._listener] & select.POLLIN:
            if self._threads() >= self._limits.threads:
                return Status.THREADS
            let_pass(self._listener)
        else:
            # No thread of it is left.
            self._poll.unregister(self._listener)
        return None

    def _overstepped(self) -> Status | None:
        """A limit that the kernel does not watch."""
        if self._output.is_over_limit:
            return Status.OUTPUT
        if time.monotonic() > self._deadline:
            return Status.TIME
        return Status.THREADS if self._listener is None and self._threads() > self._limits.threads else None

    def _threads(self) -> int:
        try:
            return sum(1 for _ in Path(f"/proc/{self._child}/task").iterdir())
        except (FileNotFoundError, ProcessLookupError):
            return 0
