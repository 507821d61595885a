"""The process behind `GraderPool`: reads requests from an inherited pipe until the pool closes it."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection

from xbai.errors import UserError
from xbai.grading import dispatch
from xbai.grading.custom import CustomBatchGrader, CustomFunction
from xbai.grading.dispatch import ERROR, MEMORY, Grade, Grader, GradeRequest, Preparation
from xbai.sandbox.confine import hide_memory

START_TIMEOUT_S = 120.0
"""What the imports of a grader may take."""
ORPHAN_GRACE_S = 30.0
"""A worker whose pool was killed ends itself this long after a time limit."""


Answer = list[Grade] | UserError
"""A grade for each request, or why they are refused."""
Reply = Preparation | Answer
"""What the worker sends, behind the number of the request: a `Preparation` when the grader starts, then an answer."""


def main(file_descriptor: int) -> None:
    """Serve the pool at the other end of the pipe."""
    # It knows the right answers, and a program that it tests may be of the same user.
    hide_memory()
    connection = Connection(file_descriptor)
    grader, timeout_s, memory_bytes = connection.recv()
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    own_pid = os.getpid()

    def send(reply: Reply) -> None:
        if os.getpid() != own_pid:
            # The grader forked, and this is the copy: the answer is the other one's to give.
            os._exit(0)
        connection.send((number, reply))

    while True:
        try:
            number, requests = connection.recv()
        except EOFError:
            return
        send(_answer(grader, requests, timeout_s, send))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _end_after(seconds: float) -> None:
    # Nothing handles this signal in Python, so that it ends even a process that is stuck inside a C call.
    signal.setitimer(signal.ITIMER_REAL, seconds + ORPHAN_GRACE_S)


def _answer(
    grader: Grader | CustomBatchGrader,
    requests: list[GradeRequest],
    timeout_s: float,
    send: Callable[[Preparation], None],
) -> Answer:
    _end_after(START_TIMEOUT_S)
    try:
        # Imports first: the pool's clock starts with the message below.
        preparation = _prepare(grader, requests)
        limit_s = max(timeout_s, preparation.time_limit_s)
        _end_after(limit_s)
        send(Preparation(limit_s, preparation.warning))
        results = grader(requests) if isinstance(grader, CustomBatchGrader) else map(grader, requests)
        return [dispatch.as_grade(result) for result in results]
    except UserError as error:
        return UserError(str(error))
    except MemoryError:
        return [Grade(None, MEMORY)] * len(requests)
    except Exception as error:
        return [Grade(None, ERROR, f"{type(error).__name__}: {error}"[:500])] * len(requests)


def _prepare(grader: Grader | CustomBatchGrader, requests: list[GradeRequest]) -> Preparation:
    if isinstance(grader, CustomFunction):
        grader.load()
    if grader not in (dispatch.grade, dispatch.compare):
        return Preparation()
    [request] = requests
    return dispatch.prepare(request)
