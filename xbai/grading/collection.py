"""Several answers in one: tuples, intervals, sets and lists, taken apart at the separators outside all brackets."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from xbai.grading.latex import without_text_commands

_SEPARATOR = re.compile(r"\\cup(?![A-Za-z])|[,;]|\b(?:and|or)\b")
_MATRIX = re.compile(r"\\begin ?\{([pb]matrix)\}(?P<entries>.*)\\end ?\{\1\}")
_BELOW = r" ?(?:<|\\le(?![A-Za-z])) ?"
_VARIABLE = r"(?:[A-Za-z]|\\[a-z]+)"
_BOUND = re.compile(rf"{_VARIABLE} ?(?P<sign>[<>]|\\[lg]e(?![A-Za-z])) ?(?P<bound>[^<>=]+)")
_RANGE = re.compile(rf"(?P<low>[^<>=]+?)(?P<left>{_BELOW}){_VARIABLE}(?P<right>{_BELOW})(?P<high>[^<>=]+)")

Item = TypeVar("Item")
Same = Callable[[Item, Item], bool]


@dataclass(frozen=True)
class Collection:
    """A tuple or an interval with its brackets, a set, or a bare list (or union)."""

    items: list[str]
    brackets: str = ""

    @property
    def ordered(self) -> bool:
        return self.brackets not in ("", "{}")

    @classmethod
    def parse(cls, text: str) -> Collection | None:
        """None where the text is a single answer."""
        items = split_list(without_text_commands(text))
        if len(items) > 1:
            return cls([case for item in items for case in signs(item)])
        if "\\pm" in text:
            return cls(signs(text))
        if text.startswith("\\{") and text.endswith("\\}"):
            return cls(split_list(text[2:-2]), "{}")
        if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
            items = split_list(text[1:-1])
            return cls(items, text[0] + text[-1]) if len(items) > 1 else None
        return None

    def matches(self, truth: Collection, same: Same[str]) -> bool:
        """Whether the items are the same, in their order if one side gives an order."""
        if len(self.items) != len(truth.items):
            return False
        if self.ordered and truth.ordered:
            return self.brackets == truth.brackets and all(map(same, self.items, truth.items))
        if self.ordered or truth.ordered:
            # A tuple without its brackets is forgiven, a set is not a tuple.
            return "{}" not in (self.brackets, truth.brackets) and all(map(same, self.items, truth.items))
        return same_unordered(self.items, truth.items, same)


def same_unordered(items: list[Item], true_items: list[Item], same: Same[Item]) -> bool:
    """Whether two lists hold the same items, in any order."""
    remaining = list(true_items)
    for item in items:
        match = next((index for index, other in enumerate(remaining) if same(item, other)), None)
        if match is None:
            return False
        del remaining[match]
    return not remaining


def split_list(text: str) -> list[str]:
    """The items of a list; the text alone where brackets do not close."""
    items, _ = split(text, _SEPARATOR)
    # "1, 2, and 3" has an empty item between its last two separators.
    return [item for item in items if item]


def split(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The texts between the separators outside all brackets, and those; the text alone if its brackets do not close."""
    items, found, depth, start, position = [], [], 0, 0, 0
    while position < len(text):
        match = separator.match(text, position) if depth == 0 else None
        if match:
            items.append(text[start:position].strip())
            found.append(match.group())
            start = position = match.end()
            continue
        depth += (text[position] in "([{") - (text[position] in ")]}")
        if depth < 0:
            return [text], []
        position += 1
    return ([*items, text[start:].strip()], found) if depth == 0 else ([text], [])


def closes_brackets(text: str) -> bool:
    """Whether brackets close as often as they open: the parser takes seconds to give up where one does not."""
    return all(
        sum(map(text.count, opening)) == sum(map(text.count, closing)) for opening, closing in ("{}", ("([", ")]"))
    )


def signs(text: str) -> list[str]:
    """Both cases of `\\pm`; a text without one alone."""
    if "\\pm" not in text:
        return [text]
    return [re.sub(r"\\pm ?", sign, text) for sign in ("+", "-")]


def as_tuple(text: str) -> str:
    """`x < a` as `(-\\infty,a)`, `a < x \\le b` as `(a,b]`, a vector as its entries; anything else as it is."""
    if (found := _MATRIX.fullmatch(text)) and not ("&" in found["entries"] and "\\\\" in found["entries"]):
        entries = re.sub(r"&|\\\\", ",", found["entries"]).strip(" ,")
        return f"({entries})"
    if found := _RANGE.fullmatch(text):
        left, right = "(" if "<" in found["left"] else "[", ")" if "<" in found["right"] else "]"
        return f"{left}{found['low']},{found['high']}{right}"
    if found := _BOUND.fullmatch(text):
        bound, closed = found["bound"].strip(), found["sign"].startswith("\\")
        if found["sign"] in ("<", "\\le"):
            return f"(-\\infty,{bound}{']' if closed else ')'}"
        return f"{'[' if closed else '('}{bound},\\infty)"
    return text
