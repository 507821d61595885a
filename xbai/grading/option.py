"""A multiple-choice option in a mathematical answer: `\\textbf{(B) }\\frac12`, `B. 12`, `Option B`."""

from __future__ import annotations

import re
from dataclasses import dataclass

_WORD = r"(?i:(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?:? ?)"
_IN_TEXT = re.compile(
    rf"\\text ?\{{ ?(?P<label>{_WORD}?(?:\([A-Ja-j]\)[.:]?|[A-Ja-j][.:)])"
    rf"|{_WORD}[A-Ja-j](?![A-Za-z0-9])|[A-J](?= ?\}}))"
    r" ?(?P<rest>[^{}]*)\}"
)
_LABEL = re.compile(
    rf"(?:{_WORD}(?P<named>\(?[A-Ja-j]\)?)(?![A-Za-z0-9])[.:]?"
    r"|\( ?(?P<bracketed>[A-Ja-j]) ?\)(?![A-Za-z(\[])[.:]?"
    r"|(?P<closed>[A-Ja-j])\)[.:]?"
    r"|(?P<pointed>[A-Ja-j]) ?[.:](?![A-Za-z])) ?"
)
_OPERATOR = re.compile(r"[+*/^_=<>,;)\]}!&]|\\(?:c[ua]p|times|cdot|le|ge|ne|in|setminus)(?![A-Za-z])|(?:and|or)\b")
_ANOTHER = re.compile(r"\([A-J]\)|\b[A-Ja-j][.:]|\b[A-J]\)")
_LETTER = re.compile(r"\\text ?\{ ?\(?([A-J])\)? ?\}|([A-J])")


@dataclass(frozen=True)
class Option:
    """A choice's letter, in upper case, and its text, which can be empty."""

    letter: str
    text: str = ""

    @classmethod
    def parse(cls, text: str) -> Option | None:
        """None where the cleaned answer names no single option by more than a bare letter."""
        # Space keeps `\text{(B) }(1,2)` from reading as a product.
        text = _IN_TEXT.sub(_out_of_text, text, count=1) if text.startswith(("\\text", "(\\text")) else text
        found = _LABEL.match(text)
        if not found or not found.lastgroup:
            return None
        rest = text[found.end() :].strip()
        if _OPERATOR.match(rest) or _ANOTHER.search(rest):
            return None
        return cls(found[found.lastgroup].strip("()").upper(), rest)


def option_letter(text: str) -> str | None:
    """The letter of an answer that is a bare capital letter of an option. (Lower-case ones are variables.)"""
    found = _LETTER.fullmatch(text)
    return found and (found[1] or found[2])


def _out_of_text(found: re.Match[str]) -> str:
    rest = found["rest"].strip()
    return f"{found['label']} " + (f"\\text{{{rest}}}" if re.search("[A-Za-z]", rest) else rest)
