"""The sandbox as its user sees it: a harness process, started when first needed, that runs one job after another."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from contextlib import AbstractContextManager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

from xbai.errors import UserError
from xbai.sandbox import landlock, seccomp
from xbai.sandbox.confine import Walls, python_paths
from xbai.sandbox.forking import UNABLE, patiently
from xbai.sandbox.job import Job, Outcome, Status

START_TIMEOUT_S = 60.0
ANSWER_GRACE_S = 30.0
"""How much longer than a job's own limit the harness may take, on a busy machine, to start and to end it."""
END_TIMEOUT_S = 5.0
"""How long the harness may take to end, from when it closed its connection."""
ATTEMPTS = 2
"""How many harnesses a job gets to run in."""

_PACKAGE = Path(__file__).parent
_CODE = (
    f"import sys; sys.path.insert(0, {str(_PACKAGE.parents[1])!r}); from xbai.sandbox.supervisor import main; main()"
)
# Threads of numpy's libraries count as the program's.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", **_ONE_THREAD}


class SandboxError(Exception):
    """The sandbox itself failed, so that nothing is known about the job."""


class _HarnessEndedError(SandboxError):
    pass


class Sandbox(AbstractContextManager["Sandbox"]):
    """Runs untrusted Python where it can do no more than compute: no processes, no network, no file written.

    Each job is a process of its own that gives up, before the submitted code starts: its privileges, nearly all system
    calls but those to compute, read and write (seccomp), and all files but Python itself (Landlock), under limits on
    processor time, memory, threads and output. Where bubblewrap works, all of this happens inside namespaces with a
    file system of their own besides.

    Args:
        bubblewrap: use it where it works.
        use_landlock: use it where the kernel has it; without it jobs can read any file.

    Attributes:
        warning: which of these walls is missing; empty where none is. Known after `start`.
    """

    def __init__(self, bubblewrap: bool = True, use_landlock: bool = True) -> None:
        self.warning = ""
        self._bubblewrap = bubblewrap
        self._walls = Walls(
            landlock=use_landlock and landlock.is_available(),
            held_threads=seccomp.is_available() and seccomp.can_hold_calls(),
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the harness, if it does not run, and see that it runs an empty program.

        Raises:
            UserError: this system cannot contain a program.
            SandboxError: the harness does not start, or runs nothing.
        """
        if self._process is not None:
            return
        if not (sys.platform == "linux" and seccomp.is_available()):
            raise UserError("submitted code is run only on Linux on x86_64 or aarch64, with seccomp in the kernel")
        missing = self._start_in_bubblewrap() if self._bubblewrap else "bubblewrap is turned off"
        if missing:
            self._start([])
        self.warning = self._describe(missing)

    def run(self, job: Job) -> Outcome:
        """Run one program to its end, or to its limits.

        A program that ends the harness time and again, while an empty one runs in it, has failed.

        Raises:
            SandboxError: the harness is stuck, or runs no program at all; the next call starts another.
            UserError: this system cannot contain a program.
        """
        for _ in range(ATTEMPTS):
            self.start()
            with suppress(_HarnessEndedError):
                return self._ask(job, job.limits.wall_s + ANSWER_GRACE_S)
        self.start()
        return Outcome(Status.ERROR, b"")

    def close(self) -> str:
        """End the harness, and with it whatever it runs; returns what it complained about."""
        if self._process is None:
            return ""
        process, self._process = self._process, None
        self._connection.close()
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        self._complaints.close()
        return lines[-1] if lines else f"status {process.returncode}"

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start_in_bubblewrap(self) -> str:
        """Start inside of bubblewrap; returns why not, if so."""
        program = shutil.which("bwrap")
        if program is None:
            return "bubblewrap is not installed"
        try:
            self._start(_bubblewrap_command(program))
        except SandboxError as error:
            return f"bubblewrap does not work here ({error})"
        return ""

    def _start(self, prefix: list[str]) -> None:
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        self._complaints = os.fdopen(os.memfd_create("stderr"), "w+b")
        with theirs:
            command = [*prefix, sys.executable, "-I", "-c", _CODE]
            try:
                self._process = patiently(lambda: self._spawn(command, theirs))
            except OSError as error:
                self._connection.close()
                self._complaints.close()
                raise SandboxError(f"its process does not start: {error}") from error
        outcome = self._ask(Job(""), START_TIMEOUT_S, self._walls)
        if outcome.status is not Status.DONE:
            self.close()
            raise SandboxError(f"an empty program fails in it: {outcome.status}")

    def _spawn(self, command: list[str], connection: socket.socket) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            stdin=connection.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=self._complaints,
            cwd="/",
            env=_ENVIRONMENT,
        )

    def _ask(self, job: Job, timeout_s: float, *before: Walls) -> Outcome:
        try:
            for message in (*before, job.limits, job):
                self._connection.send(message)
            if self._connection.poll(timeout_s):
                status, size = self._connection.recv()
                return Outcome(status, self._receive(size))
        except (EOFError, OSError) as error:
            with suppress(subprocess.TimeoutExpired):
                if self._process is not None and self._process.wait(END_TIMEOUT_S) == UNABLE:
                    self.close()
                    raise SandboxError("no room for another process of this user") from error
            raise _HarnessEndedError(self.close()) from error
        self.close()
        raise SandboxError(f"no answer from the sandbox's process within {timeout_s:g} s")

    def _receive(self, size: int) -> bytes:
        """Output as the harness sends it, without a frame."""
        with os.fdopen(os.dup(self._connection.fileno()), "rb", buffering=0) as stream:
            chunks = []
            while size and (chunk := stream.read(size)):
                chunks.append(chunk)
                size -= len(chunk)
        if size:
            raise EOFError("the output ends early")
        return b"".join(chunks)

    def _describe(self, missing: str) -> str:
        holes = [missing] if missing else []
        if not self._walls.landlock:
            holes.append("the kernel has no Landlock, so that it can read (not write) this machine's files")
        if not self._walls.held_threads:
            holes.append("the kernel (before Linux 5.5) lets nobody hold up new threads, which are counted later")
        return f"submitted code runs behind fewer walls than it could: {'; '.join(holes)}" if holes else ""


def _bubblewrap_command(program: str) -> list[str]:
    visible = [path for path in (*python_paths(), _PACKAGE) if not path.is_relative_to("/dev")]
    interpreter = Path(sys.executable)
    if not any(interpreter.is_relative_to(path) for path in visible):
        visible.append(interpreter)
    binds = [argument for path in visible for argument in ("--ro-bind", str(path), str(path))]
    isolation = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--die-with-parent"]
    return [program, *isolation, *binds, "--proc", "/proc", "--dev", "/dev", "--"]
