"""Sets of real numbers, in whatever form: intervals, inequalities, set-builders, ℝ without a few numbers, ∅."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

from sympy import Expr, FiniteSet, Intersection, Interval, S, Set, Union, oo

from xbai.grading.collection import split
from xbai.grading.inequality import real_number, solve_relation, unknown
from xbai.grading.latex import without_text_commands

_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?i)\bno (?:real )?solutions?\b|\b(?:the )?empty set\b", r"\\emptyset "),
        (
            r"(?i)\b(?:[a-z] is )?(?:the set of )?(?:all |any )?real(?:s| numbers?| values)\b(?: (?:of )?[a-z]\b)?",
            r"\\R ",
        ),
        (r"(?i)\ball real [a-z]\b", r"\\R "),
        (r"(?i)\b(?:except|excluding|other than)\b(?: for)?|\\smallsetminus(?![A-Za-z])|\\backslash", r"\\setminus "),
        (r"\\(?:mathbb|mathbf|mathrm|Bbb) ?(?:\{ ?R ?\}|R(?![A-Za-z]))|\\(?:Reals|reals)(?![A-Za-z])|ℝ", r"\\R "),
        (r"\\R(?![A-Za-z]) ?|^R$|(?<=\\in )R\b", r"\\R "),
        (r"\\middle(?![A-Za-z])", ""),
        (r"\\varnothing(?![A-Za-z])|∅|\\\{ *\\\}", r"\\emptyset "),
        (r"\\not ?\\in(?![A-Za-z])|∉", r"\\notin "),
        (r"\\not ?=|!=", r"\\ne "),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"\\[lr]?vert(?![A-Za-z])", "|"),
        (r"\\(?:lor|vee)(?![A-Za-z])|∨", " or "),
        (r"\\(?:land|wedge)(?![A-Za-z])|∧", " and "),
    ]
]
_OR = re.compile(r"\\cup(?![A-Za-z])|\bor\b")
_AND = re.compile(r"[,;]|\band\b")
_CAP = re.compile(r"\\cap(?![A-Za-z])|∩")
_MINUS = re.compile(r"\\setminus(?![A-Za-z])|(?<=\\R )- ?")
_EXCLUDING = re.compile(r"(?P<start>.*(?P<sign>\\setminus|\\ne)) [^{}]*")
_RELATION = re.compile(r"[<>=]|\\(?:le|ge|ne|in|notin)(?![A-Za-z])")
_BUILDER = re.compile(
    r"(?P<variable>[A-Za-z]|\\[a-z]+?) ?(?:\\in ?\\R )?(?:\\mid(?![A-Za-z])|[:|]|such that\b)(?P<condition>.+)"
)
_INTERVAL = re.compile(r"(?P<left>[(\[])(?P<low>[^,;]+)[,;](?P<high>[^,;]+)(?P<right>[)\]])")
_HALF_LINE = re.compile(r"\\R ?[\^_] ?\{? ?(?P<sign>[+*-]|[<>] ?0) ?\}?")
_POSITIVE, _NEGATIVE = Interval.open(0, oo), Interval.open(-oo, 0)
_HALF_LINES = {"+": _POSITIVE, ">": _POSITIVE, "-": _NEGATIVE, "<": _NEGATIVE, "*": _POSITIVE + _NEGATIVE}
_SIGNS = {"<": "<", ">": ">", "=": "==", r"\le": "<=", r"\ge": ">=", r"\ne": "!="}

Value = TypeVar("Value")


@dataclass(frozen=True)
class RealSet:
    """A set of real numbers."""

    reals: Set
    """The set."""
    variable: str | None = None
    """The name of what an inequality restricts; None where the set itself was given."""

    def equals(self, other: RealSet) -> bool:
        """Whether both hold the same numbers, and are about the same variable where both name one."""
        if self.variable and other.variable and self.variable != other.variable:
            return False
        return self.reals == other.reals or _same_parts(_parts(self.reals), _parts(other.reals))


class _NotASetError(Exception):
    """The text is not known to be a set of real numbers."""


@lru_cache(maxsize=4096)
def parse_real_set(text: str) -> RealSet | None:
    """A cleaned answer as a set; None where it is anything else, or an inequality that is not soon solved."""
    text = without_text_commands(re.sub(r"\\text ?\{ ?R ?\}", r"\\R ", text))
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    try:
        return _read(re.sub(r"\s+", " ", text).strip())
    except _NotASetError:
        return None


def _read(text: str) -> RealSet:
    cases, _ = split(text, _OR)
    return _united([_read_conditions(case) for case in cases])


def _read_conditions(text: str) -> RealSet:
    """Sets in a row are all meant; conditions on a variable hold at once, if they can."""
    parts: list[str] = []
    for part in filter(None, split(text, _AND)[0]):
        # In `x \ne 1, 2` and "all numbers except 1 and 2" the second number is excluded as well.
        excluding = _EXCLUDING.fullmatch(parts[-1]) if parts and not _RELATION.search(part) else None
        if excluding and excluding["sign"] == r"\setminus":
            parts[-1] += rf" \setminus {part}"
        else:
            parts.append(f"{excluding['start']} {part}" if excluding else part)
    if not parts:
        raise _NotASetError
    sets = [_read_intersection(part) for part in parts]
    together = _united(sets)
    if together.variable:
        common = _common(sets)
        if not common.reals.is_empty:
            return common
    return together


def _read_intersection(text: str) -> RealSet:
    return _common([_read_difference(part) for part in split(text, _CAP)[0]])


def _read_difference(text: str) -> RealSet:
    first, *excluded = (part.strip() for part in split(text, _MINUS)[0])
    whole = _read_one(first)
    for part in excluded:
        number = real_number(part)
        whole = RealSet(whole.reals - (_read_one(part).reals if number is None else FiniteSet(number)), whole.variable)
    return whole


def _read_one(text: str) -> RealSet:
    if text == r"\R":
        return RealSet(S.Reals)
    if text == r"\emptyset":
        return RealSet(S.EmptySet)
    if found := _HALF_LINE.fullmatch(text):
        return RealSet(_HALF_LINES[found["sign"][0]])
    if found := _INTERVAL.fullmatch(text):
        low, high = (_known(real_number(found[bound])) for bound in ("low", "high"))
        if not low < high:
            raise _NotASetError
        return RealSet(Interval(low, high, found["left"] == "(", found["right"] == ")"))
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return _read_braces(text[2:-2].strip())
    return _read_chain(text)


def _read_braces(text: str) -> RealSet:
    if found := _BUILDER.fullmatch(text):
        condition = _read(found["condition"])
        if condition.variable != found["variable"].lstrip("\\"):
            raise _NotASetError
        return RealSet(condition.reals)
    return RealSet(FiniteSet(*(_known(real_number(item)) for item in split(text, _AND)[0])))


def _read_chain(text: str) -> RealSet:
    """Relations in a row, `1 < x \\le 3`, or `x \\in` a set."""
    sides, relations = split(text, _RELATION)
    if not relations or not all(sides):
        raise _NotASetError
    if relations in ([r"\in"], [r"\notin"]):
        members, letter = _read_one(sides[1]).reals, _known(unknown(sides[0]))
        return RealSet(members if relations == [r"\in"] else S.Reals - members, letter)
    if not set(relations) <= set(_SIGNS):
        raise _NotASetError
    solved = (
        _known(solve_relation(left, _SIGNS[sign], right))
        for (left, right), sign in zip(pairwise(sides), relations, strict=True)
    )
    return _common([RealSet(*found) for found in solved])


def _common(sets: list[RealSet]) -> RealSet:
    """The numbers that are in all of them."""
    return RealSet(Intersection(*(part.reals for part in sets)), _united(sets).variable)


def _united(sets: list[RealSet]) -> RealSet:
    """All their numbers; the variable is the one that they share."""
    variables = {part.variable for part in sets} - {None}
    if len(variables) > 1:
        raise _NotASetError
    return RealSet(Union(*(part.reals for part in sets)), next(iter(variables), None))


def _known(value: Value | None) -> Value:
    if value is None:
        raise _NotASetError
    return value


def _parts(reals: Set) -> list[tuple[Expr, Expr, bool, bool]]:
    """Bounds of the intervals, and whether they are left out, in their order; a single number is one that it bounds."""
    parts = []
    for part in Union.make_args(reals):
        if isinstance(part, FiniteSet):
            parts += [(number, number, False, False) for number in part]
        elif part is not S.EmptySet:
            parts.append((part.inf, part.sup, part.left_open, part.right_open))
    return sorted(parts, key=lambda bounds: float(bounds[0]))


def _same_parts(parts: list[tuple[Expr, Expr, bool, bool]], others: list[tuple[Expr, Expr, bool, bool]]) -> bool:
    return len(parts) == len(others) and all(
        bounds[2:] == other[2:] and _same_number(bounds[0], other[0]) and _same_number(bounds[1], other[1])
        for bounds, other in zip(parts, others, strict=True)
    )


def _same_number(first: Expr, second: Expr) -> bool:
    return first == second or (first.is_finite and second.is_finite and bool((first - second).equals(0)))
