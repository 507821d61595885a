"""The process behind `GraderPool`: reads requests from an inherited pipe until the pool closes it."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection

from xbai.errors import UserError
from xbai.grading.comparison import compare
from xbai.grading.custom import CustomGrader
from xbai.grading.dispatch import Grade, Grader, GradeRequest, Preparation, as_grade, grade, prepare
from xbai.sandbox.confine import hide_memory

STARTED, GRADED, RAISED, REFUSED, OUT_OF_MEMORY = "started", "graded", "raised", "refused", "memory"
Reply = Grade | list[Grade] | Preparation | str
"""What goes with a kind of reply; the third part of a reply is the number of its request."""

START_TIMEOUT_S = 120.0
"""What the imports of a grader may take."""
ORPHAN_GRACE_S = 30.0
"""A worker whose pool was killed ends itself this long after a time limit."""


def main(file_descriptor: int) -> None:
    """Serve the pool at the other end of the pipe."""
    # It knows the right answers, and a program that it tests may be of the same user.
    hide_memory()
    connection = Connection(file_descriptor)
    grader, timeout_s, memory_bytes = connection.recv()
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    own_pid = os.getpid()

    def reply(kind: str, value: Reply) -> None:
        if os.getpid() != own_pid:
            # The grader forked, and this is the copy: the answer is the other one's to give.
            os._exit(0)
        connection.send((kind, value, number))

    while True:
        try:
            number, request = connection.recv()
        except EOFError:
            return
        reply(*_answer(grader, request, timeout_s, reply))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _end_after(seconds: float) -> None:
    # Nothing handles this signal in Python, so that it ends even a process that is stuck inside a C call.
    signal.setitimer(signal.ITIMER_REAL, seconds + ORPHAN_GRACE_S)


def _answer(
    grader: Grader, request: GradeRequest | list[GradeRequest], timeout_s: float, reply: Callable[[str, Reply], None]
) -> tuple[str, Reply]:
    _end_after(START_TIMEOUT_S)
    try:
        # Imports first: the pool's clock starts with the message below.
        preparation = Preparation()
        if grader in (grade, compare):
            preparation = prepare(request)
        elif isinstance(grader, CustomGrader):
            grader.load()
        limit_s = max(timeout_s, preparation.time_limit_s)
        _end_after(limit_s)
        reply(STARTED, Preparation(limit_s, preparation.warning))
        result = grader(request)
        return GRADED, [as_grade(each) for each in result] if isinstance(request, list) else as_grade(result)
    except UserError as error:
        return REFUSED, str(error)
    except MemoryError:
        return OUT_OF_MEMORY, ""
    except Exception as error:
        return RAISED, f"{type(error).__name__}: {error}"[:500]
