"""AIME 2024 and 2025: 30 problems each, whose answers are integers from 0 to 999."""

import re

from xbai.benchmarks.base import MathBenchmark, Row
from xbai.errors import UserError

LARGEST_ANSWER = 999
_DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|°)$")


class AIME(MathBenchmark):
    """What the years have in common."""

    def answer_from_row(self, row: Row, place: str) -> int:
        """The answer as the integer that it is, whether the file holds `16`, `"16"`, `"016"` or `"16^\\circ"`."""
        answer = _DEGREES.sub("", str(super().answer_from_row(row, place)).strip())
        if not answer.isdecimal() or int(answer) > LARGEST_ANSWER:
            raise UserError(f"{place}: an AIME answer must be an integer from 0 to {LARGEST_ANSWER}, not {answer!r}")
        return int(answer)


class AIME24(AIME):
    """Both papers of 2024."""

    name = data_source = "aime24"


class AIME25(AIME):
    """Both papers of 2025."""

    name = data_source = "aime25"
