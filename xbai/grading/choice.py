"""Multiple choice: `ANSWER: X`, `答案：X` or a boxed letter, whichever comes last."""

import re
import unicodedata

from xbai.grading.boxed import after_thinking

_LETTER = r"(?P<letter>[A-J])(?![A-Za-z0-9])(?!\s*(?:or|and|或者?|和|及|与|/|,|、|&)\s*[A-J](?![A-Za-z0-9]))"
_OPENING = r"[\s*_`'\"“‘(\[{$]*(?:\\(?:text|textbf|mathbf|mathrm|boxed)\s*\{[\s(]*)*"
# An option that is only named, in an explanation, is not chosen: `选项` needs a verb.
_STATED = re.compile(
    r"(?:(?i:answer|答案)[\s*_\"'”]*(?:is|是|应该是|应为|应选|为|选择|选)?[\s*_]*:?"
    r"|选项[\s*_]*(?:应该是|应为|是|为|:)[\s*_]*:?"
    r"|(?<!不)(?:故|应|所以|因此)选择?[\s*_]*:?"
    r"|\\boxed\s*\{)"
    rf"{_OPENING}(?:选项?)?{_LETTER}"
)
_BARE = re.compile(rf"{_OPENING}{_LETTER}[\s*_`'\"”’)\]}}$.]*")


def chosen_option(response: str) -> str | None:
    """The letter chosen last; None where no single one is."""
    text = unicodedata.normalize("NFKC", after_thinking(response))
    statements = list(_STATED.finditer(text))
    if statements:
        return statements[-1]["letter"]
    bare = _BARE.fullmatch(text.strip())
    return bare["letter"] if bare else None


def grade_choice(response: str, letter: str) -> bool:
    """Whether the response chose option `letter`."""
    return chosen_option(response) == letter.strip().upper()
