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
from numbers import Number
from types import CodeType, ModuleType
from typing import Any, NamedTuple, NoReturn

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


class Channels(NamedTuple):
    """Descriptors of a program's process."""

    stdin: int
    output: int
    """What it prints, or what its function returned; to be written."""
    control: int
    """A socket to the supervisor, who gets the listener of the filter by it."""


def run_in_this_process(job: Job, preamble: CodeType, walls: Walls, channels: Channels, parent: int) -> NoReturn:
    """Run the job behind walls, and end with one of the statuses above."""
    code = FAILED
    try:
        die_with(parent)
        _redirect(channels, is_program=job.function is None)
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
            _call_function(job, module)
        code = DONE
    except MemoryError:
        code = OUT_OF_MEMORY
    finally:
        os._exit(code)


def _redirect(channels: Channels, is_program: bool) -> None:
    """Leave the standard streams; a function's result goes to `_RESULT_FD`, what it prints is of no interest."""
    output, control = (
        fcntl.fcntl(descriptor, fcntl.F_DUPFD, _CONTROL_FD + 1) for descriptor in (channels.output, channels.control)
    )
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(channels.stdin, 0)
    os.dup2(output if is_program else null, 1)
    os.dup2(null, 2)
    os.dup2(null if is_program else output, _RESULT_FD)
    os.dup2(control, _CONTROL_FD)
    os.closerange(_CONTROL_FD + 1, os.sysconf("SC_OPEN_MAX"))
    sys.argv = [_FILE_NAME]
    sys.stdin = os.fdopen(0, encoding="utf-8", errors="replace", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def _hand_over(listener: int | None) -> None:
    """Give the supervisor the listener, and keep no way to it."""
    with socket.socket(fileno=_CONTROL_FD) as control:
        if listener is not None:
            socket.send_fds(control, [b"\0"], [listener])
            os.close(listener)


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
