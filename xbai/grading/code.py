"""Programs: the last fenced block of the response, run in a sandbox against all tests of its problem."""

from __future__ import annotations

import json
from decimal import Decimal, InvalidOperation
from functools import cache, lru_cache

from xbai.grading.boxed import after_thinking
from xbai.grading.code_tests import Case, read_code_tests
from xbai.grading.dispatch import Preparation
from xbai.sandbox.job import Job, Limits, Status
from xbai.sandbox.process import Sandbox

FENCE = "```"
LIMITS = Limits()
"""Of each test."""
START_S = 1.0
"""What starting and ending a test may take, on average."""

_read_code_tests = lru_cache(maxsize=4)(read_code_tests)


def grade_code(response: str, tests: str) -> bool:
    """Whether the program in `response` passes every test in `tests` (see `read_code_tests`)."""
    code = last_code_block(response)
    if code is None:
        return False
    known = _read_code_tests(tests)
    return all(_passes(code, known.function, case) for case in known.cases)


def prepare(tests: str) -> Preparation:
    """Start the sandbox, and say how long all tests may take together."""
    _sandbox().start()
    return Preparation(len(_read_code_tests(tests).cases) * (LIMITS.wall_s + START_S), _sandbox().warning)


def last_code_block(response: str) -> str | None:
    """The content of the last fenced block after the thinking; None without one, and when it is not closed.

    An unclosed last block, which was cut off, is not replaced by an earlier one.
    """
    last: str | None = None
    block: list[str] | None = None
    indent = ""
    for line in after_thinking(response).split("\n"):
        text = line.strip()
        if block is None:
            if text.startswith(FENCE):
                block, indent = [], line[: line.index(FENCE)]
        elif text == FENCE:
            last, block = "\n".join(block), None
        else:
            block.append(line.removeprefix(indent))
    return last if block is None else None


def same_output(output: str, expected: str) -> bool:
    """Whether two outputs are the same but for space around lines, and for how numbers are written."""
    lines, true_lines = output.strip().split("\n"), expected.strip().split("\n")
    return len(lines) == len(true_lines) and all(map(_same_line, lines, true_lines))


def same_result(result: str, expected: str) -> bool:
    """Whether two values, as JSON, are equal."""
    try:
        return json.loads(result) == json.loads(expected)
    except (ValueError, RecursionError):
        return False


@cache
def _sandbox() -> Sandbox:
    return Sandbox()


def _passes(code: str, function: str | None, case: Case) -> bool:
    if function is None:
        job, same = Job(code, stdin=case.input, limits=LIMITS), same_output
    else:
        arguments = [json.loads(line) for line in case.input.split("\n") if line.strip()]
        job, same = Job(code, function=function, arguments=arguments, limits=LIMITS), same_result
    outcome = _sandbox().run(job)
    return outcome.status is Status.DONE and same(outcome.output.decode(errors="replace"), case.output)


def _same_line(line: str, expected: str) -> bool:
    if line.strip() == expected.strip():
        return True
    try:
        return list(map(Decimal, line.split())) == list(map(Decimal, expected.split()))
    except InvalidOperation:
        return False
