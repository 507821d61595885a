"""Grading in processes that can be killed: a hang, crash or memory bomb costs one sample its grade, nothing else.

The workers are plain Python processes that run `xbai.grading.worker`. multiprocessing, and pools built on it, would
import the parent's `__main__` in each of them, which in a trainer means torch, Ray and Hydra.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from types import TracebackType

import xbai
from xbai.errors import UserError
from xbai.grading.dispatch import Grader, GradeRequest, grade
from xbai.grading.worker import MEMORY, RAISED, REFUSED, START_TIMEOUT_S, STARTED

logger = logging.getLogger(__name__)

GIBIBYTE = 2**30


class GraderPool:
    """A fixed number of killable grading processes, started when first needed.

    Args:
        workers: processes; the machine's cores when not given.
        timeout_s: wall-clock limit of one grade (imports not counted).
        grader: what grades; picklable. Default: by the request's data source.
        memory_bytes: address space of one worker.

    Attributes:
        failures: how many samples got no grade, by reason (`timeout`, `crash`, `memory`, `error`).
    """

    def __init__(
        self,
        workers: int | None = None,
        timeout_s: float = 10.0,
        grader: Grader = grade,
        memory_bytes: int = 4 * GIBIBYTE,
    ) -> None:
        count = workers or len(os.sched_getaffinity(0))
        self.failures: Counter[str] = Counter()
        self._failures_lock = Lock()
        self._workers = [_Worker(grader, timeout_s, memory_bytes) for _ in range(count)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        # One thread per worker does nothing but wait for it.
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="grader")

    def submit(self, request: GradeRequest) -> Future[float | None]:
        """Grade in the background; the future holds the grade, or None where the response could not be graded.

        A `UserError` of the grader (an unknown data source, say) comes out of the future.
        """
        return self._threads.submit(self._grade_one, request)

    def grade(self, requests: Sequence[GradeRequest]) -> list[float | None]:
        """Grade all, in the order given; None where a response could not be graded."""
        return [future.result() for future in [self.submit(request) for request in requests]]

    def close(self) -> None:
        """Drop what has not begun, wait for what has, and end the processes. Safe to call twice."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _grade_one(self, request: GradeRequest) -> float | None:
        worker = self._idle.get()
        try:
            return worker.grade(request)
        except _CouldNotGradeError as failure:
            with self._failures_lock:
                self.failures[failure.reason] += 1
            logger.warning("a response of %s was not graded: %s", request.data_source, failure)
            return None
        finally:
            self._idle.put(worker)


class _CouldNotGradeError(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason} ({detail})")
        self.reason = reason


class _Worker:
    """One grading process; started on the first request and again after it had to be killed."""

    def __init__(self, grader: Grader, timeout_s: float, memory_bytes: int) -> None:
        self._timeout_s, self._memory_bytes = timeout_s, memory_bytes
        self._settings = pickle.dumps((grader, timeout_s, memory_bytes))
        self._process: subprocess.Popen | None = None

    def grade(self, request: GradeRequest) -> float:
        if self._process is None:
            self._start()
        try:
            self._connection.send(request)
            kind, value = self._receive(START_TIMEOUT_S)
            if kind == STARTED:
                kind, value = self._receive(self._timeout_s)
        except (EOFError, OSError) as error:
            raise _CouldNotGradeError("crash", f"the process ended with status {self.stop()}") from error
        if kind == REFUSED:
            raise UserError(value)
        if kind == MEMORY:
            self.stop()
            raise _CouldNotGradeError("memory", f"more than {self._memory_bytes / GIBIBYTE:.1f} GiB")
        if kind == RAISED:
            raise _CouldNotGradeError("error", value)
        return value

    def stop(self) -> int | None:
        """Kill the process and its descendants, if there is one; returns its exit status."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        self._connection.close()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait()

    def _receive(self, timeout_s: float) -> tuple[str, float | str]:
        if not self._connection.poll(timeout_s):
            self.stop()
            raise _CouldNotGradeError("timeout", f"no answer within {timeout_s:g} s")
        return self._connection.recv()

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        search_path = [str(Path(xbai.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        with theirs:
            self._process = subprocess.Popen(
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
        self._connection.send_bytes(self._settings)
