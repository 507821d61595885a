"""Finding the final answer in a response."""

import re

THINK_CLOSE = "</think>"
MAX_ANSWER_CHARACTERS = 1000

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")


def after_thinking(response: str) -> str:
    """The text after the last `</think>`; all of it without one."""
    return response.rpartition(THINK_CLOSE)[-1]


def final_answer(response: str) -> str | None:
    """The last box after the thinking; None where there is none, or what it holds is empty or too long to be one."""
    answer = (last_boxed(after_thinking(response)) or "").strip()
    return answer if 0 < len(answer) <= MAX_ANSWER_CHARACTERS else None


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{}`; None without one, and when its braces do not close.

    A malformed last box is not replaced by an earlier one, which the model has moved on from.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if not text.startswith("{", start):
        # `\boxed 7` is LaTeX for a box around one token.
        token = re.match(r"\\[A-Za-z]+|\d+|[A-Za-z]", text[start:])
        return token.group() if token else None
    end = closing_brace(text, start)
    return text[start + 1 : end] if end is not None else None


def closing_brace(text: str, start: int) -> int | None:
    """Where the brace at `start` closes; escaped braces (`\\{`) are text. None when it does not."""
    depth, position = 0, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None
