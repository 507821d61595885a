"""The submitted program's process: from the walls around it to the result of the program."""

from __future__ import annotations

import builtins
import fcntl
import json
import os
import socket
import sys
import threading
from contextlib import suppress
from decimal import Decimal
from multiprocessing.connection import Connection
from numbers import Complex
from types import CodeType, ModuleType
from typing import Any, NoReturn

from xbai.sandbox.confine import Walls, confine, die_with
from xbai.sandbox.job import MAX_INT_DIGITS, Job

DONE, FAILED, OUT_OF_MEMORY = 0, 1, 77
"""What the process ends with."""
_FILE_NAME = "solution.py"
_RESULT_FD, _CONTROL_FD = 3, 4
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


def compile_preamble() -> CodeType:
    """What stands before every program, and has run here once so that it costs little there."""
    preamble = compile("\n".join(_PREAMBLE), "<preamble>", "exec")
    exec(preamble, {})
    return preamble


def run_in_this_process(
    connection: Connection, preamble: CodeType, walls: Walls, output_fd: int, control: socket.socket, parent: int
) -> NoReturn:
    """Read a job, run it behind walls, and end with one of the statuses above.

    Args:
        connection: the job comes from here.
        preamble: of `compile_preamble`.
        walls: around the program.
        output_fd: gets what it prints, or what its function returns.
        control: the supervisor gets a byte by it before the program starts, with the listener of the filter.
        parent: the supervisor.
    """
    code = FAILED
    try:
        die_with(parent)
        job: Job = connection.recv()
        _redirect(job, output_fd, control.fileno())
        _hand_over(confine(job.limits, walls))
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
            _call_function(job, job.function, module)
        code = DONE
    except MemoryError:
        code = OUT_OF_MEMORY
    finally:
        os._exit(code)


def _redirect(job: Job, output_fd: int, control_fd: int) -> None:
    """Leave the standard streams; a function's result goes to `_RESULT_FD`, what it prints is of no interest."""
    is_program = job.function is None
    given = _memory_file(job.stdin.encode(errors="replace")), output_fd, control_fd
    # Out of the way of the numbers that they are to have.
    stdin, output, control = (fcntl.fcntl(descriptor, fcntl.F_DUPFD, _CONTROL_FD + 1) for descriptor in given)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(stdin, 0)
    os.dup2(output if is_program else null, 1)
    os.dup2(null, 2)
    os.dup2(null if is_program else output, _RESULT_FD)
    os.dup2(control, _CONTROL_FD)
    os.closerange(_CONTROL_FD + 1, os.sysconf("SC_OPEN_MAX"))
    sys.argv = [_FILE_NAME]
    sys.stdin = os.fdopen(0, encoding="utf-8", errors="replace", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def _memory_file(content: bytes) -> int:
    descriptor = os.memfd_create("stdin")
    with os.fdopen(os.dup(descriptor), "wb") as stream:
        stream.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _hand_over(listener: int | None) -> None:
    """Tell the supervisor that the program starts, give it the listener, and keep no way to either."""
    with socket.socket(fileno=_CONTROL_FD) as control:
        if listener is None:
            control.send(b"\0")
        else:
            socket.send_fds(control, [b"\0"], [listener])
            os.close(listener)


def _run_program(code: str, module: ModuleType) -> None:
    with suppress(SystemExit):
        exec(compile(code, _FILE_NAME, "exec"), module.__dict__)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()


def _call_function(job: Job, name: str, module: ModuleType) -> None:
    exec(compile(job.code, _FILE_NAME, "exec"), module.__dict__)
    owner = module.__dict__["Solution"]() if "Solution" in module.__dict__ else module
    result = getattr(owner, name)(*job.arguments)
    with open(_RESULT_FD, "w", encoding="utf-8") as stream:
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
    if isinstance(value, Complex | Decimal):
        # mpmath's numbers can become an int, but not be truncated.
        real: Any = value.real
        for plain in (int(real), float(real)):
            if plain == value:
                return plain
    raise TypeError(f"a result of type {type(value).__name__}")
