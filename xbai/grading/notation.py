"""Other ways of writing formulas, as the LaTeX that the parser reads: plain text, upright names, regional notation."""

from __future__ import annotations

import re
from collections.abc import Callable

from xbai.grading.boxed import closing_bracket

_FUNCTIONS = (
    "sqrt pi sin cos tan cot csc sinh cosh tanh coth arcsin arccos arctan arccot exp ln log lg tg ctg cotg arctg arcctg"
    " cosec arcsinh arccosh arctanh arsinh arcosh artanh"
)
_NAMES = {name: rf"\{name}" for name in _FUNCTIONS.split()} | dict.fromkeys(("inf", "infinity", "oo"), r"\infty")
"""Words that stand for a symbol or a function wherever they stand alone."""
_CALLS = {
    "sec": r"\sec",
    "max": r"\max",
    "min": r"\min",
    "gcd": r"\gcd",
    "lcm": r"\operatorname{lcm}",
    "asin": r"\arcsin",
    "acos": r"\arccos",
    "atan": r"\arctan",
    "log2": r"\log_{2}",
    "log10": r"\log_{10}",
}
"""Words that do so before a bracket; else they may be units or variables."""
_ENCLOSED = {
    "cbrt": r"\sqrt[3]{%s}",
    "abs": "|%s|",
    "floor": r"\lfloor %s\rfloor ",
    "ceil": r"\lceil %s\rceil ",
    "factorial": "(%s)!",
}
_REGIONAL = {
    "lg": r"\log_{10}",
    "tg": r"\tan",
    "ctg": r"\cot",
    "cotg": r"\cot",
    "arctg": r"\arctan",
    "arcctg": r"\arccot",
    "cosec": r"\csc",
}

_NAME = re.compile(rf"(?<![\\A-Za-z])({'|'.join(_NAMES)})(?![A-Za-z])")
_CALL = re.compile(rf"(?<![\\A-Za-z])({'|'.join(_CALLS)})(?=\()")
_ENCLOSING = re.compile(rf"(?<![\\A-Za-z])({'|'.join(_ENCLOSED)})(?=\()")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")
_ALWAYS, _IN_CALLS = "|".join([*_NAMES, *"eijkxyz"]), "|".join(_CALLS)
_UPRIGHT = re.compile(
    rf"\\text\s*\{{\s*(?:(?P<name>{_ALWAYS}|\\[A-Za-z]+)\s*\}}|(?P<call>{_IN_CALLS})\s*\}}(?=\s*\()|d\s*\}}(?=\s*[A-Za-z]))"
)
_BRACKETED_ROOT = re.compile(r"\\sqrt\s*(?:\[[^][]*\]\s*)?(?=\()")
_BRACKETED_POWER = re.compile(r"\^\s*(?=\()")
_DOTTED = re.compile(
    r"(?P<start>\d*\.\d*)\\dot\s*\{?(?P<first>\d)\}?(?:(?P<middle>\d*)\\dot\s*\{?(?P<last>\d)\}?)?(?!\d)"
)
# 2e-3 may be a difference with Euler's number.
_SCIENTIFIC = re.compile(
    r"(?<![A-Za-z\d.])(\d*\.\d+|\d+(?=[eE][+-]?0\d|[eE]\+?\d)|1(?=[eE]-\d))[eE]\+?(-?)0*(\d+)(?![\d.^_A-Za-z!])"
)
_ENDLESS = re.compile(r"(\.\d*?)(?:(\d)\2{2,}|(\d{2,}?)\3{2,})\s*(?:\\[lc]?dots(?![A-Za-z])|\.{3}|…)")

_LETTER = r"(?:\\text\s*\{\s*%s\s*\}|%s)"
_COUNT = r"\s*(?:\{\s*(?P<%s>\d+)\s*\}|(?P<%s1>\d+))"


def _counted(letters: str) -> list[re.Pattern[str]]:
    """`C_5^2`, `C^2_5` and `{}_5C_2`, upright or not."""
    letter = rf"(?P<kind>{'|'.join(_LETTER % (each, each) for each in letters)})"
    total, chosen = (_COUNT % (name, name) for name in ("total", "chosen"))
    return [
        re.compile(rf"(?<![\\A-Za-z]){letter}\s*_{total}\s*\^{chosen}(?!\d)"),
        re.compile(rf"(?<![\\A-Za-z]){letter}\s*\^{chosen}\s*_{total}(?!\d)"),
        re.compile(rf"(?:\{{\s*\}}\s*|(?<![A-Za-z\d)}}]))[_^]{total}\s*{letter}\s*_{chosen}(?!\d)"),
    ]


_COMBINATIONS = _counted("C")
_PERMUTATIONS = _counted("AP")

_Replacement = str | Callable[[re.Match[str]], str]

_WRITTEN: list[tuple[str, _Replacement]] = [
    (r"\*\*", "^"),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"\\ast(?![A-Za-z])", r"\\cdot "),
    (r"\\imath(?![A-Za-z])", "i"),
    (r"\^\s*([+-]\s*\d+)", r"^{\1}"),
    (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
    (r"\{\s*\{?([^{}]*)\}?\s*\\choose(?![A-Za-z])\s*\{?([^{}]*)\}?\s*\}", r"\\binom{\1}{\2}"),
    (r"^([^{}\\]*)\\choose(?![A-Za-z])([^{}\\]*)$", r"\\binom{\1}{\2}"),
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"(\.\d*)\\bar(?![A-Za-z])\s*\{?(\d+)\}?", r"\1\\overline{\2}"),
    (r"((?<!\d)\d+\.)\((\d+)\)", r"\1\\overline{\2}"),
    (r"(\\sqrt(?:\[[^][]*\])?)\s*(\d+|[A-Za-z]|\\pi(?![A-Za-z]))", r"\1{\2}"),
    (r"^(?:\s|=|\\(?:approx|sim|simeq|doteq|thickapprox)(?![A-Za-z]))+", ""),
    (r"^(?:\\text\s*\{\s*)?(?:approximately|approx\.?|about)\s*\}?\s*(?=[-\d\\.])", ""),
    (r"^([A-Za-z](?:_\{?\w+\}?)?)\s*\\approx(?![A-Za-z])", r"\1="),
    (rf"\\({'|'.join(_REGIONAL)})(?![A-Za-z])", lambda found: _spaced(_REGIONAL[found[1]], found)),
]
_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in _WRITTEN]


def standard_notation(text: str) -> str:
    """A formula in the LaTeX that the parser reads; words that are no formula stay as they are."""
    text = _UPRIGHT.sub(_without_text_command, text)
    text = _CALL.sub(lambda found: _CALLS[found[1]], text)
    if not _is_prose(text):
        text = _NAME.sub(lambda found: _spaced(_NAMES[found[1]], found), text)
    while found := _ENCLOSING.search(text):
        end = closing_bracket(text, found.end())
        if end is None:
            break
        text = text[: found.start()] + _ENCLOSED[found[1]] % text[found.end() + 1 : end] + text[end + 1 :]
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    for pattern in (_BRACKETED_ROOT, _BRACKETED_POWER):
        text = _in_braces(pattern, text)
    text = _DOTTED.sub(_overlined, text)
    text = _ENDLESS.sub(lambda found: rf"{found[1]}\overline{{{found[2] or found[3]}}}", text)
    text = _SCIENTIFIC.sub(r"\1\\times 10^{\2\3}", text)
    for pattern in _COMBINATIONS:
        text = pattern.sub(_combinations, text)
    for pattern in _PERMUTATIONS:
        text = pattern.sub(_permutations, text)
    return text


def _spaced(replacement: str, found: re.Match[str]) -> str:
    """A replacement that letters around it do not run into."""
    before, after = found.string[: found.start()][-1:], found.string[found.end() :][:1]
    left = " " if before.isalpha() and replacement[0].isalpha() else ""
    return f"{left}{replacement}{' ' if after.isalpha() and replacement[-1].isalpha() else ''}"


def _without_text_command(found: re.Match[str]) -> str:
    name = found["name"] or found["call"]
    if name is None:
        return "d"  # Of a differential.
    return _spaced((_NAMES | _CALLS).get(name, name), found)


def _is_prose(text: str) -> bool:
    """Words, of which one is longer than a product of variables and no name of a function."""
    words = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).strip()
    return bool(_WORDS.fullmatch(words)) and any(
        len(word) > 2 and word not in _NAMES for word in re.split(r"[\s'-]+", words)
    )


def _in_braces(pattern: re.Pattern[str], text: str) -> str:
    """Braces for the round brackets after each match."""
    position = 0
    while found := pattern.search(text, position):
        position = found.end()
        end = closing_bracket(text, position)
        if end is not None:
            text = f"{text[:position]}{{{text[position + 1 : end]}}}{text[end + 1 :]}"
    return text


def _overlined(found: re.Match[str]) -> str:
    repeating = found["first"] + (found["middle"] + found["last"] if found["last"] else "")
    return rf"{found['start']}\overline{{{repeating}}}"


def _counts(found: re.Match[str]) -> tuple[int, int]:
    return int(found["total"] or found["total1"]), int(found["chosen"] or found["chosen1"])


def _combinations(found: re.Match[str]) -> str:
    total, chosen = _counts(found)
    return rf"\binom{{{total}}}{{{chosen}}}" if total >= chosen else found[0]


def _permutations(found: re.Match[str]) -> str:
    total, chosen = _counts(found)
    return rf"\frac{{{total}!}}{{{total - chosen}!}}" if total >= chosen else found[0]
