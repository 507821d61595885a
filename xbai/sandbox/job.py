"""What is run in the sandbox, under which limits, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

MEBIBYTE = 2**20
MAX_INT_DIGITS = 50_000
"""Of an integer read or written in decimal digits, which takes time that grows with their square; as LiveCodeBench."""


@dataclass(frozen=True)
class Limits:
    """What one run may use. The clock on the wall is the longer limit, so that a busy machine fails no right answer.

    Attributes:
        cpu_s: processor seconds, whole ones.
        wall_s: seconds on the clock.
        memory_bytes: address space.
        output_bytes: on standard output.
        threads: at a time, the main one included.
    """

    cpu_s: int = 6
    wall_s: float = 20.0
    memory_bytes: int = 2048 * MEBIBYTE
    output_bytes: int = 16 * MEBIBYTE
    threads: int = 32


@dataclass(frozen=True)
class Job:
    """One run of a program: fed by standard input, or by a call of one of its functions.

    Attributes:
        code: Python source.
        stdin: what it reads.
        function: name of a function, or of a method of its class `Solution`; None runs the code as a program.
        arguments: what the function is called with.
        limits: of this run.
    """

    code: str
    stdin: str = ""
    function: str | None = None
    arguments: list[Any] = field(default_factory=list)
    limits: Limits = field(default_factory=Limits)


class Status(StrEnum):
    """How a run ended."""

    DONE = "done"
    ERROR = "error"
    TIME = "time"
    MEMORY = "memory"
    OUTPUT = "output"
    THREADS = "threads"


@dataclass(frozen=True)
class Outcome:
    """What came of a run: its standard output, or what the function returned as JSON."""

    status: Status
    output: bytes
