"""The process behind `Sandbox`: has each job that arrives on file descriptor 0 run by a process that ends with the job.

It imports little, and nothing that a submitted program should not see. What a job leaves in memory, its source, its
input and its output, is never in this process, from which later ones are forked.
"""

from __future__ import annotations

import os
import signal
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from types import CodeType
from typing import NoReturn

from xbai.sandbox import libc
from xbai.sandbox.confine import Walls, die_with, hide_memory, python_paths
from xbai.sandbox.forking import UNABLE, fork
from xbai.sandbox.program import compile_preamble
from xbai.sandbox.supervisor import run

_SERVED, _FAILED, _NO_MORE = 0, 1, 2


def main() -> NoReturn:
    """Serve until the other end closes."""
    connection = Connection(0)
    walls = connection.recv()
    python_paths()
    preamble = compile_preamble()
    hide_memory()
    # What a job leaves behind becomes a child of this process.
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
    harness = os.getpid()
    while True:
        reader = fork()
        if reader == 0:
            _serve_one(connection, preamble, walls, harness)
        status = os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1])
        _end_group(reader)
        if status != _SERVED:
            os._exit(UNABLE if status == UNABLE else _FAILED if status != _NO_MORE else 0)


def _serve_one(connection: Connection, preamble: CodeType, walls: Walls, harness: int) -> NoReturn:
    status = _FAILED
    try:
        # The program cannot leave this group.
        os.setpgid(0, 0)
        die_with(harness)
        job = connection.recv()
        connection.send(run(job, preamble, walls, connection.fileno()))
        status = _SERVED
    except EOFError:
        status = _NO_MORE
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _end_group(group: int) -> None:
    """End what is left of a process group, all of it children of this process by then."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            os.wait()
