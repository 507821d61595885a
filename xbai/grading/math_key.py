"""What a mathematical answer is counted as in a vote. Without computer algebra, whose import takes seconds."""

from __future__ import annotations

import re

from xbai.grading.boxed import final_answer
from xbai.grading.latex import clean, in_words
from xbai.grading.quantity import parse_quantity


def math_key(response: str) -> str | None:
    """The boxed final answer: its value and unit where it is a number, else its normal form; None without one.

    Unlike the grader's comparison this is an equivalence, so it forgives less: `5 cm` is graded as `5` where that is
    right, but votes apart from it.
    """
    answer = final_answer(response)
    if answer is None:
        return None
    text = clean(answer)
    if quantity := parse_quantity(text):
        return f"number {quantity.value} {quantity.unit or ''}"
    if words := in_words(text):
        return f"words {words}"
    return "latex " + re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", text)
