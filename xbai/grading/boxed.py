"""Finding the final answer in a response."""

import re

THINK_CLOSE = "</think>"
MAX_ANSWER_CHARACTERS = 1000

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_TEXT = re.compile(r"\\(?:text\w*|mathrm|mbox)\s*(?=\{)")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|[。！？]")
_VERB = re.compile(r"\b(?:is|are|equals|equal to)\b|\banswer\s*:|答案\s*[是为:：]", re.IGNORECASE)
_FORMULA = re.compile(r"[\d$(\[{+−.√π-]|\\(?!text|mathrm|mbox)|[A-Za-z]\s*[=+*/^_-]")


def after_thinking(response: str) -> str:
    """The text after the last `</think>`; all of it without one."""
    return response.rpartition(THINK_CLOSE)[-1]


def final_answer(response: str) -> str | None:
    """The last box after the thinking; None where there is none, or what it holds is empty or too long to be one.

    Of sentences in the box ("The answer is 5."), the number or formula that they state last.
    """
    answer = (last_boxed(after_thinking(response)) or "").strip()
    return stated_value(answer) or answer if 0 < len(answer) <= MAX_ANSWER_CHARACTERS else None


def stated_value(text: str) -> str | None:
    """The number or formula that the last sentence with one says something to be; None without such a sentence."""
    command = _TEXT.match(text)
    if command and closing_bracket(text, command.end()) == len(text) - 1:
        text = text[command.end() + 1 : -1]
    for sentence in reversed(_SENTENCE_END.split(text)):
        verbs = list(_VERB.finditer(sentence))
        # The words before a formula may stand in a command of their own.
        value = sentence[verbs[-1].end() :].lstrip(" :}").rstrip(" .") if verbs else ""
        if len(verbs) == 1 and _FORMULA.match(value):
            return value
    return None


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
    end = closing_bracket(text, start)
    return text[start + 1 : end] if end is not None else None


def closing_bracket(text: str, start: int) -> int | None:
    """Where the bracket at `start` closes; escaped ones (`\\{`) are text. None when it does not."""
    closing = {"{": "}", "(": ")"}[text[start]]
    depth = 0
    for found in re.compile(rf"\\.|[{text[start]}{closing}]", re.DOTALL).finditer(text, start):
        depth += (found[0] == text[start]) - (found[0] == closing)
        if depth == 0:
            return found.start()
    return None
