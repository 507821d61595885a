"""Multiple choice: `ANSWER: X`, `答案：X` or a boxed letter, whichever comes last."""

import re
import unicodedata

from xbai.grading.boxed import after_thinking

_LETTER = r"(?P<letter>[A-J])(?![A-Za-z0-9])(?!\s*(?:or|and|或者?|和|及|与|/|,|、|&)\s*[A-J](?![A-Za-z0-9]))"
_OPENING = r"[\s*_`'\"“‘(\[{$]*(?:\\(?:text|textbf|mathbf|mathrm|boxed)\s*\{[\s(]*)*"
_VERB = r"(?:is|是|应该是|应为|应选|为|选)?"
_STATED = re.compile(
    rf"(?i:answer|答案|选项)[\s*_\"'”]*{_VERB}[\s*_]*:?{_OPENING}(?:选项?)?{_LETTER}"
    rf"|(?:故选|应选|所以选|因此选){_OPENING}{_LETTER.replace('letter', 'letter2')}"
    rf"|\\boxed\s*\{{{_OPENING}{_LETTER.replace('letter', 'letter3')}"
)
_BARE = re.compile(rf"{_OPENING}{_LETTER}[\s*_`'\"”’)\]}}$.]*")


def chosen_option(response: str) -> str | None:
    """The letter chosen last; None where no single one is."""
    text = unicodedata.normalize("NFKC", after_thinking(response))
    statements = list(_STATED.finditer(text))
    if statements:
        return next(letter for letter in statements[-1].groups() if letter)
    bare = _BARE.fullmatch(text.strip())
    return bare["letter"] if bare else None


def grade_choice(response: str, letter: str) -> bool:
    """Whether the response chose option `letter`."""
    return chosen_option(response) == letter.strip().upper()
