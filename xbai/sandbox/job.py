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
    """What one run may use. The clock on the wall is the longer limit, so that a busy machine fails no right answer."""

    cpu_s: int = 6
    """Processor seconds, whole ones."""
    wall_s: float = 20.0
    memory_bytes: int = 2048 * MEBIBYTE
    """Address space."""
    output_bytes: int = 16 * MEBIBYTE
    """On standard output."""
    threads: int = 32
    """At a time, the main one included."""


@dataclass(frozen=True)
class Job:
    """One run of a program: fed by standard input, or by a call of one of its functions."""

    code: str
    """Python source."""
    stdin: str = ""
    function: str | None = None
    """Name of a function, or of a method of its class `Solution`; None runs the code as a program."""
    arguments: list[Any] = field(default_factory=list)
    """What the function is called with."""
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
