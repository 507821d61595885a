"""Programs: run in a sandbox against all tests of their problem, and compared as LiveCodeBench's checker does."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from functools import cache, lru_cache

from xbai.grading.code_tests import Case, read_code_tests
from xbai.grading.dispatch import Preparation
from xbai.grading.program import find_program
from xbai.sandbox.job import MAX_INT_DIGITS, Job, Limits, Status
from xbai.sandbox.process import Sandbox

LIMITS = Limits()
"""Of each test."""
START_S = 1.0
"""What starting and ending a test may take, on average."""

_read_code_tests = lru_cache(maxsize=4)(read_code_tests)


def grade_code(response: str, tests: str) -> bool:
    """Whether the program in `response` passes every test in `tests` (see `read_code_tests`)."""
    known = _read_code_tests(tests)
    with _long_integers():
        code = find_program(response, known.function)
        return code is not None and all(_passes(code, known.function, case) for case in known.cases)


def prepare(tests: str) -> Preparation:
    """Start the sandbox, and say how long all tests may take together."""
    _sandbox().start()
    return Preparation(len(_read_code_tests(tests).cases) * (LIMITS.wall_s + START_S), _sandbox().warning)


def same_output(output: str, expected: str) -> bool:
    """Whether two outputs are the same but for space around lines, and for how equal numbers are written."""
    lines, true_lines = output.strip().split("\n"), expected.strip().split("\n")
    return len(lines) == len(true_lines) and all(map(_same_line, lines, true_lines))


def same_result(result: str, expected: str) -> bool:
    """Whether two values, as JSON, are equal; numbers to the last digit."""
    try:
        return json.loads(result) == json.loads(expected)
    except (ValueError, RecursionError):
        return False


@contextmanager
def _long_integers() -> Iterator[None]:
    """Read integers as long as a program may write."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(MAX_INT_DIGITS)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)


@cache
def _sandbox() -> Sandbox:
    return Sandbox()


def _passes(code: str, function: str | None, case: Case) -> bool:
    if function is None:
        job = Job(code, stdin=case.input, limits=LIMITS)
    else:
        arguments = [json.loads(line) for line in case.input.split("\n") if line.strip()]
        job = Job(code, function=function, arguments=arguments, limits=LIMITS)
    outcome = _sandbox().run(job)
    same = same_output if function is None else same_result
    return outcome.status is Status.DONE and same(outcome.output.decode(errors="replace"), case.output)


def _same_line(line: str, expected: str) -> bool:
    if line.strip() == expected.strip():
        return True
    numbers, true_numbers = line.split(), expected.split()
    try:
        return len(numbers) == len(true_numbers) and all(
            Decimal(number) == Decimal(true) for number, true in zip(numbers, true_numbers, strict=True)
        )
    except InvalidOperation:
        return False
