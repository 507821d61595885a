"""Grading in processes that can be killed: a hang, crash or memory bomb costs one sample its grade, nothing else.

The workers are plain Python processes that run `xbai.grading.worker`. multiprocessing, and pools built on it, would
import the parent's `__main__` in each of them, which in a trainer means torch, Ray and Hydra.
"""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock

import xbai
from xbai.errors import UserError
from xbai.grading.custom import CustomBatchGrader
from xbai.grading.dispatch import CRASH, ERROR, MEMORY, TIMEOUT, Grade, Grader, GradeRequest, Preparation, grade
from xbai.grading.worker import START_TIMEOUT_S, Reply
from xbai.sandbox.forking import patiently

logger = logging.getLogger(__name__)

GIBIBYTE = 2**30

KILL_GRACE_S = 5.0
"""How long to wait for a killed process: one that the kernel holds in a system call ends only after it."""


class GraderPool(AbstractContextManager["GraderPool"]):
    """A fixed number of killable grading processes, started when first needed.

    Args:
        workers: processes; the machine's cores when not given.
        timeout_s: wall-clock limit of one call of the grader (imports not counted); more where code is tested, whose
            tests have limits of their own.
        grader: what grades; picklable. Default: by the request's data source.
        memory_bytes: address space of one worker.
        failure_level: of the log, for what got no grade; each failure is a line.

    Attributes:
        failures: how many samples got no grade, by reason (`timeout`, `crash`, `memory`, `error`).
    """

    def __init__(
        self,
        workers: int | None = None,
        timeout_s: float = 10.0,
        grader: Grader | CustomBatchGrader = grade,
        memory_bytes: int = 4 * GIBIBYTE,
        failure_level: int = logging.WARNING,
    ) -> None:
        count = workers or len(os.sched_getaffinity(0))
        self.failures: Counter[str] = Counter()
        self._failures_lock = Lock()
        self._failure_level = failure_level
        self._killed = False
        self._workers = [_Worker(grader, timeout_s, memory_bytes) for _ in range(count)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        # One thread per worker does nothing but wait for it.
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="grader")

    def submit(self, request: GradeRequest) -> Future[Grade]:
        """Grade in the background; a `UserError` of the grader (an unknown data source, say) comes out of it."""
        return self._threads.submit(lambda: self._grade([request], f"a response of {request.data_source} was")[0])

    def submit_batch(self, requests: Sequence[GradeRequest]) -> Future[list[Grade]]:
        """Grade all in one call of a grader that takes a list; where it fails, none of them has a grade."""
        return self._threads.submit(self._grade, list(requests))

    def grade(self, requests: Sequence[GradeRequest]) -> list[float | None]:
        """Grade all, in the order given; None where a response could not be graded."""
        return [future.result().value for future in [self.submit(request) for request in requests]]

    def close(self) -> None:
        """Drop what has not begun, wait for what has, and end the processes. Safe to call twice."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def kill(self) -> None:
        """Like `close`, without waiting for what has begun: it gets no grade."""
        self._killed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.kill()
        self.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _grade(self, requests: Sequence[GradeRequest], subject: str = "") -> list[Grade]:
        worker = self._idle.get()
        try:
            grades = worker.grade(requests)
        except _CouldNotGradeError as error:
            grades = [Grade(None, error.failure, error.detail)] * len(requests)
        finally:
            self._idle.put(worker)
        failed = [grade for grade in grades if grade.value is None]
        if failed and not self._killed:
            with self._failures_lock:
                self.failures.update(grade.failure or ERROR for grade in failed)
            subject = subject or f"{len(failed)} of {len(grades)} responses were"
            logger.log(self._failure_level, "%s not graded: %s (%s)", subject, failed[0].failure, failed[0].detail)
        return grades


@cache
def _warn_once(warning: str) -> None:
    if warning:
        logger.warning(warning)


class _CouldNotGradeError(Exception):
    def __init__(self, failure: str, detail: str) -> None:
        super().__init__(f"{failure} ({detail})")
        self.failure, self.detail = failure, detail


class _Worker:
    """One grading process; started on the first request and again after it had to be killed."""

    def __init__(self, grader: Grader | CustomBatchGrader, timeout_s: float, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._settings = pickle.dumps((grader, timeout_s, memory_bytes))
        self._process: subprocess.Popen | None = None
        self._numbers = itertools.count()
        self._killed = Event()

    def kill(self) -> None:
        """End the process from another thread: the one that waits for it sees the end of the pipe."""
        self._killed.set()
        # That thread forgets the process when it stops it.
        process = self._process
        if process is not None and process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def grade(self, requests: Sequence[GradeRequest]) -> list[Grade]:
        """A grade for each.

        Raises:
            UserError: the grader refuses the requests.
            _CouldNotGradeError: there is none for all of them.
        """
        try:
            if self._process is None:
                self._start()
            number = next(self._numbers)
            self._connection.send((number, requests))
            reply = self._receive(number, START_TIMEOUT_S)
            if isinstance(reply, Preparation):
                _warn_once(reply.warning)
                reply = self._receive(number, reply.time_limit_s)
        except (EOFError, OSError) as error:
            raise _CouldNotGradeError(CRASH, f"the process ended with status {self.stop()}: {error!r}") from error
        if isinstance(reply, UserError):
            raise reply
        if not isinstance(reply, list) or len(reply) != len(requests):
            self.stop()
            raise _CouldNotGradeError(CRASH, "the process sent what is no reply to this request")
        if reply and all(grade.failure == MEMORY for grade in reply):
            self.stop()
            raise _CouldNotGradeError(MEMORY, f"more than {self._memory_bytes / GIBIBYTE:.1f} GiB")
        return reply

    def stop(self) -> int | None:
        """Kill the process and its descendants, if there is one; returns its exit status."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        self._connection.close()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            return process.wait(KILL_GRACE_S)
        return None

    def _receive(self, number: int, timeout_s: float) -> Reply:
        if not self._connection.poll(timeout_s):
            self.stop()
            raise _CouldNotGradeError(TIMEOUT, f"no answer within {timeout_s:g} s")
        try:
            of, reply = self._connection.recv()
        except (EOFError, OSError):
            raise
        except Exception as error:  # Bytes that are no reply can fail to be unpickled in any way.
            self.stop()
            raise _CouldNotGradeError(CRASH, f"the process sent what is no reply: {error!r}") from error
        if of != number:
            self.stop()
            raise _CouldNotGradeError(CRASH, "the process replied to another request")
        return reply

    def _start(self) -> None:
        try:
            self._connection, self._process = patiently(self._spawn, self._killed.wait)
        except OSError as error:
            raise _CouldNotGradeError(CRASH, f"the process does not start: {error}") from error
        if self._killed.is_set():
            self.kill()
        self._connection.send_bytes(self._settings)

    def _spawn(self) -> tuple[Connection, subprocess.Popen]:
        ours, theirs = Pipe()
        search_path = [str(Path(xbai.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        with ExitStack() as unless_started, theirs:
            unless_started.callback(ours.close)
            process = subprocess.Popen(
                [sys.executable, "-c", f"from xbai.grading.worker import main; main({theirs.fileno()})"],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # A group of its own: Ctrl-C is the parent's to handle, and a grader's children die with it.
                start_new_session=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, search_path)),
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                },
            )
            unless_started.pop_all()
        return ours, process
