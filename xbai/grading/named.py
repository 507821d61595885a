"""Names before values: `x = 5`, `P(3,-1)`, `(x,y) = (1,2)`, `x = 1, y = 2`."""

from __future__ import annotations

import re
from typing import NamedTuple

from xbai.grading.collection import Collection, Same, same_unordered, split_list
from xbai.grading.latex import compact, without_text_commands

Solution = dict[str, str]
"""The value of each unknown."""

_SYMBOL = r"\\?[A-Za-z]+(?:_(?:\w|\{[^{}=]*\}))?'*"
_SYMBOLS = rf"{_SYMBOL}(?: ?[,;] ?{_SYMBOL})+"
_NAME = (
    rf"\\text ?\{{[^{{}}]*\}}|{_SYMBOL}(?:\([^()=]*\))?"
    rf"|\\(?:vec|hat|bar|overline|overrightarrow) ?(?:\{{[^{{}}]*\}}|[A-Za-z])"
    rf"|\({_SYMBOLS}\)|\\\{{{_SYMBOLS}\\\}}"
    r"|\\begin ?\{(?P<matrix>[pbv]?matrix)\}[^=]*?\\end ?\{(?P=matrix)\}"
)
_NAMED = re.compile(rf"(?P<name>{_NAME}) ?(?:=|\\in(?![A-Za-z])) ?(?P<value>[^=]+)")
_MIRRORED = re.compile(rf"(?P<value>[^=]+?) ?= ?(?P<name>{_SYMBOL})")
_POINT = re.compile(
    r"(?P<name>(?:\\text ?\{[^{}]*\} ?)?[A-Z]?(?:_\{?\w+\}?)?'*) ?:? ?"
    r"(?P<value>\((?:[^()]|\([^()]*\))*,(?:[^()]|\([^()]*\))*\))"
)
_TUPLE = re.compile(rf"\((?P<names>{_SYMBOLS})\) ?(?:=|\\in(?![A-Za-z])) ?(?P<value>.+)")
_ROWS = re.compile(r"(?:\\\{)? ?\\begin ?\{(cases|array|aligned)\} ?(?:\{[lcr]+\})?(?P<rows>.*)\\end ?\{\1\} ?\.?")
_ROW = re.compile(r"[^=&{}]+=[^=&]+")
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne)(?![A-Za-z])")
_LETTER = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")
_COORDINATES = {"x", "y", "z"}


class Named(NamedTuple):
    """A value and its name."""

    name: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Named | None:
        """None where the text is no `name = value` (or `value = name`, for a value without letters)."""
        found = _NAMED.fullmatch(text)
        # In `x = 0 or x > 1` the name belongs to the first case only.
        if found and not _RELATION.search(re.sub(r"\\\{.*\\\}", "", found["value"])):
            return cls(found["name"], found["value"])
        found = _MIRRORED.fullmatch(text)
        return cls(found["name"], found["value"]) if found and not _LETTER.search(found["value"]) else None

    @property
    def is_constant(self) -> bool:
        """Whether the value holds no letter."""
        return not _LETTER.search(self.value)

    def same_name(self, other: Named) -> bool:
        """Whether the names are the same; an index that only one of them has does not tell them apart."""
        name, true_name = compact(self.name), compact(other.name)
        if name.startswith(r"\{"):
            return sorted(re.findall(_SYMBOL, name)) == sorted(re.findall(_SYMBOL, true_name))
        return name == true_name or name.partition("_")[0] == true_name or name == true_name.partition("_")[0]


def without_names(answer: str, truth: str) -> tuple[str, str]:
    """Drop the name of a value where only one side has it, or both have the same."""
    named, true_named = Named.parse(answer) or _point(answer, truth), Named.parse(truth) or _point(truth, answer)
    if named and true_named and not named.same_name(true_named):
        return answer, truth
    return named.value if named else answer, true_named.value if true_named else truth


def read_solutions(text: str) -> list[Solution] | None:
    """Values of two unknowns or more, once or several times: `(x,y)=(1,2),(2,1)`, `x=1, y=2`, `x=y=2`.

    None where the text is anything else, or its solutions are not all of the same unknowns.
    """
    solutions: list[Solution] = []
    names: list[str] = []
    for item in split_list(without_text_commands(text)):
        if found := _TUPLE.fullmatch(item):
            names = [compact(name.strip()) for name in re.split("[,;]", found["names"])]
            item = found["value"]
        if names:
            values = _tuples(item)
            if values is None or any(len(value) != len(names) for value in values):
                return None
            solutions += [dict(zip(names, value, strict=True)) for value in values]
            continue
        *symbols, value = (part.strip() for part in item.split("="))
        if not symbols or not value or not all(re.fullmatch(_SYMBOL, symbol) for symbol in symbols):
            return None
        for symbol in map(compact, symbols):
            if not solutions or symbol in solutions[-1]:
                solutions.append({})
            solutions[-1][symbol] = value
    unknowns = set(solutions[0]) if solutions else set()
    return solutions if len(unknowns) > 1 and all(set(solution) == unknowns for solution in solutions) else None


def same_solutions(answer: list[Solution], truth: list[Solution], same: Same[str]) -> bool:
    """Whether the unknowns have the same values, solution by solution in any order."""

    def same_values(first: Solution, second: Solution) -> bool:
        return set(first) == set(second) and all(same(first[name], second[name]) for name in first)

    return same_unordered(answer, truth, same_values)


def as_tuples(solutions: list[Solution]) -> str:
    """The values without names, in the order of writing or that of the coordinates x, y and z."""
    order = list(solutions[0])
    if set(order) <= _COORDINATES:
        order.sort()
    return ", ".join(f"({', '.join(solution[name] for name in order)})" for solution in solutions)


def rows_as_list(text: str) -> str:
    """A system of equations in rows as a list of them; anything else as it is."""
    found = _ROWS.fullmatch(text)
    rows = [row.strip(" ,;") for row in (found["rows"] if found else text).split(r"\\")]
    rows = [row for row in rows if row]
    return ", ".join(rows) if len(rows) > 1 and all(_ROW.fullmatch(row) for row in rows) else text


def is_point(text: str) -> bool:
    """Whether it is a tuple, with a name or without."""
    return _POINT.fullmatch(text) is not None


def _point(text: str, other: str) -> Named | None:
    """A point with its name (`P(3,-1)`), which stands beside another one."""
    found, beside = _POINT.fullmatch(text), _POINT.fullmatch(other.rpartition("=")[-1].strip())
    return Named(found["name"], found["value"]) if found and found["name"] and beside else None


def _tuples(text: str) -> list[list[str]] | None:
    """`(1,2)`, `(1,2),(2,1)` or a set of them as their values."""
    found = Collection.parse(text)
    if found and found.brackets == "()":
        return [found.items]
    if not found:
        return None
    values = [value.items for item in found.items if (value := Collection.parse(item)) and value.brackets == "()"]
    return values if len(values) == len(found.items) else None
