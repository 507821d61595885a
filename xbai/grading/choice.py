"""Multiple choice: the option that a response states, puts into a box, calls the right one, or is nothing but."""

import re
import unicodedata

from xbai.grading.boxed import after_thinking
from xbai.grading.choice_patterns import ALONE, JUDGED, LABEL, STATED


def chosen_option(response: str) -> str | None:
    """The letter chosen; None where no single one is.

    The last statement counts. Without any: the only option that is called right, or else the option that is the
    first or last line.
    """
    text = unicodedata.normalize("NFKC", after_thinking(response)).strip()
    statements = [statement[statement.lastgroup] for statement in STATED.finditer(text) if statement.lastgroup]
    if statements:
        return _single(statements[-1])
    return _only_right_one(text) or _option_alone(text)


def grade_choice(response: str, letter: str) -> bool:
    """Whether the response chose option `letter`."""
    return chosen_option(response) == letter.strip().upper()


def _single(option: str) -> str | None:
    letters = set(re.findall(r"(?<![a-z])[A-J](?![a-z])|^[a-h]$", option))
    return letters.pop().upper() if len(letters) == 1 else None


def _only_right_one(text: str) -> str | None:
    """Unless others are judged after it, as in a list of what is true of each."""
    judged = list(JUDGED.finditer(text))
    right = [one["option"] for one in judged if one["right"]]
    return _single(right[0]) if len(right) == 1 and judged[-1]["right"] else None


def _option_alone(text: str) -> str | None:
    """Unless the response lists others as well."""
    lines = [ALONE.fullmatch(line) for line in (text.partition("\n")[0], text.rpartition("\n")[-1])]
    letters = {line["letter"].upper() for line in lines if line} | set(LABEL.findall(text))
    return letters.pop() if any(lines) and len(letters) == 1 else None
