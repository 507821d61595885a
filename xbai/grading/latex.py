"""LaTeX answers without their typography: one spelling for each way of writing the same thing."""

from __future__ import annotations

import re
import unicodedata

from xbai.grading.boxed import closing_bracket
from xbai.grading.notation import standard_notation

_COMMANDS = "pi infty times cdot sqrt pm cup le ge ne in approx ldots"
_CHARACTERS = str.maketrans(
    dict(zip("−–÷ⅇⅈ％，、；（）\u00a0\u2009", "--/ei%,,;()  ", strict=True))
    | dict(zip("π∞×·√±∪≤≥≠∈≈…", (rf"\{name} " for name in _COMMANDS.split()), strict=True))
    | {"°": r"^\circ ", "∛": r"\sqrt[3] "}
    | {
        character: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", character).split("\u2044"))
        for character in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
    }
    | dict(zip("０１２３４５６７８９", "0123456789", strict=True))
    | dict(zip("₀₁₂₃₄₅₆₇₈₉", (f"_{{{digit}}}" for digit in range(10)), strict=True))
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")

_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\\$|[$€£¥]", ""),
        (r"\\\(|\\\)|(?<!\\)\\\[|\\\]", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits)(?![A-Za-z])", ""),
        (r"(?<=\d)(?:\{,\}|,)?\\! *(?=\d{3}(?!\d))", ""),
        (r"\\!", ""),
        (r"(?<=\d)(?:\{,\}|\\[,; ])(?=\d{3}(?!\d))|(?<=\d),(?=000(?!\d))", ""),
        (r"\\(?:q?quad|thinspace)(?![A-Za-z])|(?<!\\)\\[,;: ]|~", " "),
        (r"\\(?:[dtc]|nice|s)frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac(?:\s*(\d)|\s+([A-Za-z]))\s*([A-Za-z\d])", r"\\frac{\1\2}{\3}"),
        (r"\\frac\s*(\{[^{}]*\})\s*([A-Za-z\d])", r"\\frac\1{\2}"),
        (r"\\[dt]?binom(?:\s*(\d)|\s+([A-Za-z]))\s*([A-Za-z\d])", r"\\binom{\1\2}{\3}"),
        (r"\\frac(?:\s*(\d)|\s+([A-Za-z]))\s*(\{)", r"\\frac{\1\2}\3"),
        (r"\\(leq|leqslant)(?![A-Za-z])", r"\\le"),
        (r"\\(geq|geqslant)(?![A-Za-z])", r"\\ge"),
        (r"\\neq(?![A-Za-z])", r"\\ne"),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\langle", "("),
        (r"\\rangle", ")"),
        (r"\\lbrace", r"\\{"),
        (r"\\rbrace", r"\\}"),
        (r"\\%", "%"),
        (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![A-Za-z])", r"\\text{degrees}"),
        (r"\\operatorname\*?\s*\{\s*(sec|min|max|gcd|lcm)\s*\}", r"\\\1 "),
        (r"\\(?:mathrm|text|mathbf|mathit)\s+([A-Za-z])(?![A-Za-z])", r"\\text{\1}"),
        (r"\{\s*\\(?:rm|bf|it|sf)(?![A-Za-z])([^{}]*)\}", r"\\text{\1}"),
        (r"\\(?:rm|bf|it|sf)(?![A-Za-z])", ""),
        (
            r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)|math(?:rm|bf|it|sf|tt|normal|op)|mbox|operatorname\*?|bm|boldsymbol)"
            r"\s*\{",
            r"\\text{",
        ),
        (r"\+\s*\\infty", r"\\infty"),
        (r"\^\s*\{?\s*\\prime(?![A-Za-z])\s*\}?", "'"),
    ]
]

_UNDEFINED = "dne doesnotexist doesntexist limitdoesnotexist thelimitdoesnotexist notdefined isundefined isnotdefined"
_NO_SOLUTION = "nosolutions none thereisnosolution therearenosolutions hasnosolution"
_SYNONYMS = dict.fromkeys(_UNDEFINED.split(), "undefined") | dict.fromkeys(_NO_SOLUTION.split(), "nosolution")

_ENDS = " \t\n.,;:"
_PRIMED = re.compile(r"[A-Za-z]'+")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")


def clean(text: str) -> str:
    """An answer's LaTeX with one spelling for spacing, delimiters, fractions, roots, degrees and text."""
    text = _RAISED.sub(lambda found: f"^{{{found.group().translate(_SUPERSCRIPTS)}}}", text).translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = re.sub(r"\s+", " ", standard_notation(text)).lstrip().rstrip(_ENDS)
    while text.startswith("{") and closing_bracket(text, 0) == len(text) - 1:
        text = text[1:-1].lstrip().rstrip(_ENDS)
    return text


def without_text_commands(text: str) -> str:
    """`\\text{...}` replaced by its words."""
    return re.sub(r"\s+", " ", re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)).lstrip().rstrip(_ENDS)


def in_words(text: str) -> str | None:
    """An answer in words, without case and spacing, or the letter of a choice; None where it is anything else."""
    if _PRIMED.fullmatch(text):
        return None
    words = without_text_commands(text).strip("()'\" ")
    if not _WORDS.fullmatch(words):
        return None
    if len(words) == 1:
        return words
    # Short words may be products of variables.
    if not re.search(r"[A-Za-z]{3}", words):
        return None
    words = re.sub(r"[\s'-]", "", words).lower()
    return _SYNONYMS.get(words, words)


def without_separators(text: str) -> str:
    """A number without the commas between its thousands."""
    return re.sub(r"(?<=\d),(?=\d{3})", "", text)


def in_radians(text: str) -> str:
    """The degrees that a trigonometric function is applied to, as radians."""
    if not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])", text):
        return text
    return re.sub(r"(\d+(?:\.\d+)?) ?\\text\{degrees\}", r"\\frac{\1\\pi}{180}", text)


def compact(text: str) -> str:
    """Without any space that LaTeX does not need."""
    return re.sub(r"(?<![A-Za-z]) | (?![A-Za-z])", "", text)
