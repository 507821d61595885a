"""The process behind `Sandbox`: forks one confined child for each job that arrives on file descriptor 0.

It imports little, and nothing that a submitted program should not see.
"""

from __future__ import annotations

import builtins
import fcntl
import json
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from numbers import Number
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NoReturn

from xbai.sandbox.confine import Walls, confine, python_paths
from xbai.sandbox.job import MAX_INT_DIGITS, Job, Limits, Outcome, Status

_DONE, _FAILED, _OUT_OF_MEMORY = 0, 1, 77
_STATUS_OF_EXIT = {
    _DONE: Status.DONE,
    _OUT_OF_MEMORY: Status.MEMORY,
    -signal.SIGXCPU: Status.TIME,
    # The kernel's own, at the hard limit on processor time.
    -signal.SIGKILL: Status.TIME,
}
_FILE_NAME = "solution.py"
_RESULT_FD = 3
_LOOK_S = 0.05
_CHUNK_BYTES = 2**16
_RECURSION_LIMIT = 50_000
_MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json"),
)
_PREAMBLE = [
    *(f"from {name} import *" for name in (*_MODULES, "builtins", "typing")),
    *(f"import {name}" for name in _MODULES),
]
"""What solutions on contest sites may use without importing it: what LiveCodeBench's own checker gives them."""


def main() -> None:
    """Serve until the other end closes."""
    connection = Connection(0)
    walls = connection.recv()
    python_paths()
    preamble = compile("\n".join(_PREAMBLE), "<preamble>", "exec")
    exec(preamble, {})
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(_run(job, preamble, walls))


def _run(job: Job, preamble: CodeType, walls: Walls) -> Outcome:
    input_fd = os.memfd_create("stdin")
    try:
        with os.fdopen(os.dup(input_fd), "wb") as stream:
            stream.write(job.stdin.encode(errors="replace"))
        os.lseek(input_fd, 0, os.SEEK_SET)
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            _child(job, preamble, walls, input_fd, write_end)
        os.close(write_end)
        with os.fdopen(read_end, "rb", buffering=0) as output:
            return _watch(child, output.fileno(), job.limits)
    finally:
        os.close(input_fd)


def _watch(child: int, output_fd: int, limits: Limits) -> Outcome:
    """Collect the child's output until it ends, or oversteps a limit that the kernel does not watch."""
    output, is_open = bytearray(), True
    deadline, next_look = time.monotonic() + limits.wall_s, 0.0
    while True:
        if not is_open:
            # It is about to end, or closed its output to look as if.
            time.sleep(0.001)
        elif select.select([output_fd], [], [], _LOOK_S)[0]:
            chunk = os.read(output_fd, _CHUNK_BYTES)
            output += chunk
            is_open = bool(chunk)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        now, overstepped = time.monotonic(), None
        if len(output) > limits.output_bytes:
            overstepped = Status.OUTPUT
        elif now > deadline:
            overstepped = Status.TIME
        elif now > next_look:
            overstepped = Status.THREADS if _thread_count(child) > limits.threads else None
            next_look = now + _LOOK_S
        if overstepped:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome(overstepped, b"")
    while chunk := os.read(output_fd, _CHUNK_BYTES):
        output += chunk
    if len(output) > limits.output_bytes:
        return Outcome(Status.OUTPUT, b"")
    return Outcome(_STATUS_OF_EXIT.get(os.waitstatus_to_exitcode(status), Status.ERROR), bytes(output))


def _thread_count(process: int) -> int:
    try:
        return sum(1 for _ in Path(f"/proc/{process}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _child(job: Job, preamble: CodeType, walls: Walls, input_fd: int, output_fd: int) -> NoReturn:
    code = _FAILED
    try:
        _redirect(input_fd, output_fd, is_program=job.function is None)
        confine(job.limits, walls)
        sys.setrecursionlimit(_RECURSION_LIMIT)
        sys.set_int_max_str_digits(MAX_INT_DIGITS)
        # Its own module: dataclasses and type hints look names up there.
        module = ModuleType("__main__" if job.function is None else "solution")
        module.__dict__["__builtins__"] = builtins
        # Only now: it has the names of the streams, which are this child's.
        exec(preamble, module.__dict__)
        sys.modules[module.__name__] = module
        if job.function is None:
            _run_program(job.code, module)
        else:
            _call_function(job, module)
        code = _DONE
    except MemoryError:
        code = _OUT_OF_MEMORY
    finally:
        os._exit(code)


def _redirect(input_fd: int, output_fd: int, is_program: bool) -> None:
    """Leave the standard streams; a function's result goes to `_RESULT_FD`, what it prints is of no interest."""
    output_fd = fcntl.fcntl(output_fd, fcntl.F_DUPFD, _RESULT_FD + 1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(input_fd, 0)
    os.dup2(output_fd if is_program else null, 1)
    os.dup2(null, 2)
    os.dup2(null if is_program else output_fd, _RESULT_FD)
    os.closerange(_RESULT_FD + 1, os.sysconf("SC_OPEN_MAX"))
    sys.argv = [_FILE_NAME]
    sys.stdin = os.fdopen(0, encoding="utf-8", errors="replace", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def _run_program(code: str, module: ModuleType) -> None:
    with suppress(SystemExit):
        exec(compile(code, _FILE_NAME, "exec"), module.__dict__)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()


def _call_function(job: Job, module: ModuleType) -> None:
    exec(compile(job.code, _FILE_NAME, "exec"), module.__dict__)
    owner = module.__dict__["Solution"]() if "Solution" in module.__dict__ else module
    result = getattr(owner, job.function)(*job.arguments)
    with open(_RESULT_FD, "w") as stream:
        json.dump(result, stream, default=_plain)


def _plain(value: Any) -> Any:
    """What JSON has of numpy's scalars and arrays, and of other numbers that equal one of JSON's.

    Raises:
        TypeError: nothing that JSON has equals it.
    """
    # It is there only where the program has imported it.
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.generic, numpy.ndarray)):
        return value.tolist()
    if isinstance(value, Number):
        for plain in (int(value.real), float(value.real)):
            if plain == value:
                return plain
    raise TypeError(f"a result of type {type(value).__name__}")
