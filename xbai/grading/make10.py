"""Grading of Make 10 answers: read the boxed expression and add it up; nothing is ever evaluated as code."""

import re

TARGET = 10

_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_EXPRESSION = re.compile(r"\d{1,4}(?:[+-]\d{1,4})*")
_TERM = re.compile(r"[+-]?\d+")


def boxed_expression(response: str) -> str | None:
    """The content of the last `\\boxed{}` without its spaces; None without one."""
    found = _BOXED.findall(response)
    return re.sub(r"\s", "", found[-1]) if found else None


def grade_make10(response: str, numbers: str) -> bool:
    """Whether the boxed expression makes 10 from `numbers` (such as `7 8 1 1 5`), used in order with + or - between.

    Only the expression counts: how the reasoning went, and whether partial results stayed within the range that the
    teacher keeps to, does not.
    """
    answer = boxed_expression(response)
    if answer is None or not _EXPRESSION.fullmatch(answer):
        return False
    terms = [int(term) for term in _TERM.findall(answer)]
    return [abs(term) for term in terms] == [int(number) for number in numbers.split()] and sum(terms) == TARGET
