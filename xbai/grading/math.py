"""Mathematical answers: the last box of the response, compared exactly where possible and by computer algebra else."""

from __future__ import annotations

import re
from dataclasses import dataclass

from xbai.grading.boxed import final_answer, last_boxed
from xbai.grading.latex import clean, compact, in_radians, in_words, without_separators, without_text_commands
from xbai.grading.quantity import parse_quantity, same_unit, split_unit
from xbai.grading.symbolic import symbolically_equal

_NAME_PREFIX = re.compile(
    r"(?P<name>\\text ?\{[^{}]*\}|\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([A-Za-z, ]+\))?) ?(?:=|\\in(?![A-Za-z])) ?"
    r"(?P<value>[^=]+)"
)
_BELOW = r" ?(?:<|\\le(?![A-Za-z])) ?"
_BOUND = re.compile(r"[A-Za-z] ?(?P<sign><|>|\\le|\\ge)(?![A-Za-z]) ?(?P<bound>[^<>=]+)")
_RANGE = re.compile(rf"(?P<low>[^<>=]+?)(?P<left>{_BELOW})[A-Za-z](?P<right>{_BELOW})(?P<high>[^<>=]+)")
_ON_THE_HOUR = re.compile(r"\d{1,2}:00")
_SEPARATOR = re.compile(r"\\cup(?![A-Za-z])|[,;]|\b(?:and|or)\b")


def grade_math(response: str, truth: str) -> bool:
    """Whether the boxed final answer of `response` means the same as `truth`. Without a box it is wrong."""
    answer = final_answer(response)
    return answer is not None and same_answer(answer, last_boxed(truth) or truth)


def same_answer(answer: str, truth: str) -> bool:
    """Whether two LaTeX answers mean the same."""
    return _same(clean(answer), clean(truth))


def _same(answer: str, truth: str) -> bool:
    answer, truth = _without_names(answer, truth)
    if compact(answer) == compact(truth):
        return True
    number, true_number = parse_quantity(answer), parse_quantity(truth)
    if number and true_number:
        return number.equals(true_number)
    decided = _same_words(answer, truth)
    if decided is not None:
        return decided
    items, true_items = _Collection.parse(answer), _Collection.parse(truth)
    # The commas of a list also separate thousands.
    if number and true_items is None:
        return _same_expressions(without_separators(answer), truth)
    if true_number and items is None:
        return _same_expressions(answer, without_separators(truth))
    if items or true_items:
        return _same_collections(answer, truth, items, true_items)
    return _same_expressions(answer, truth)


def _without_names(answer: str, truth: str) -> tuple[str, str]:
    """Drop `x =` or `x \\in` where only one side has it, or both have the same."""
    named, true_named = _NAME_PREFIX.fullmatch(answer), _NAME_PREFIX.fullmatch(truth)
    if named and true_named and compact(named["name"]) != compact(true_named["name"]):
        return answer, truth
    return named["value"] if named else answer, true_named["value"] if true_named else truth


def _same_words(answer: str, truth: str) -> bool | None:
    """Compare answers in words, or by the letter of a choice; None unless both are."""
    words, true_words = in_words(answer), in_words(truth)
    if words is None or true_words is None or (len(words) == 1) != (len(true_words) == 1):
        return None
    return words == true_words


def _same_expressions(answer: str, truth: str) -> bool:
    (answer, unit), (truth, true_unit) = split_unit(in_radians(answer)), split_unit(in_radians(truth))
    if not same_unit(unit, true_unit):
        return False
    answer, truth = without_text_commands(answer), without_text_commands(truth)
    if _ON_THE_HOUR.fullmatch(truth):  # To computer algebra it is a ratio to zero.
        return answer.lstrip("0") == truth.lstrip("0")
    if "=" in answer and "=" not in truth:
        answer = answer.rpartition("=")[-1]
    # The parser takes seconds to give up on unclosed brackets.
    return bool(answer and truth) and _closes_brackets(answer) and symbolically_equal(answer, truth)


def _closes_brackets(text: str) -> bool:
    return all(
        sum(map(text.count, opening)) == sum(map(text.count, closing)) for opening, closing in ("{}", ("([", ")]"))
    )


@dataclass(frozen=True)
class _Collection:
    """Several answers in one: a tuple or an interval with its brackets, a set, or a bare list (or union)."""

    items: list[str]
    brackets: str = ""

    @property
    def ordered(self) -> bool:
        return self.brackets not in ("", "{}")

    @classmethod
    def parse(cls, text: str) -> _Collection | None:
        """None where the text is a single answer."""
        items = _split(without_text_commands(text))
        if len(items) > 1:
            return cls([case for item in items for case in _signs(item)])
        if "\\pm" in text and len(_signs(text)) > 1:
            return cls(_signs(text))
        if text.startswith("\\{") and text.endswith("\\}"):
            return cls(_split(text[2:-2]), "{}")
        if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
            items = _split(text[1:-1])
            return cls(items, text[0] + text[-1]) if len(items) > 1 else None
        return None


def _same_collections(answer: str, truth: str, items: _Collection | None, true_items: _Collection | None) -> bool:
    if items is None:
        items = _Collection.parse(_as_interval(answer)) or _Collection([answer])
    if true_items is None:
        true_items = _Collection.parse(_as_interval(truth)) or _Collection([truth])
    if len(items.items) != len(true_items.items):
        return False
    if items.ordered and true_items.ordered:
        return items.brackets == true_items.brackets and all(map(_same, items.items, true_items.items))
    if items.ordered or true_items.ordered:
        # A tuple without its brackets is forgiven, a set is not a tuple.
        return "{}" not in (items.brackets, true_items.brackets) and all(map(_same, items.items, true_items.items))
    return _same_unordered(items.items, true_items.items)


def _same_unordered(items: list[str], true_items: list[str]) -> bool:
    remaining = list(true_items)
    for item in items:
        match = next((other for other in remaining if _same(item, other)), None)
        if match is None:
            return False
        remaining.remove(match)
    return True


def _split(text: str) -> list[str]:
    """Split at the separators outside all brackets; an incomplete bracket or an empty item means no list at all."""
    items, depth, start, position = [], 0, 0, 0
    while position < len(text):
        separator = _SEPARATOR.match(text, position) if depth == 0 else None
        if separator:
            items.append(text[start:position].strip())
            start = position = separator.end()
            continue
        depth += (text[position] in "([{") - (text[position] in ")]}")
        position += 1
    # "1, 2, and 3" has an empty item between its last two separators.
    items = [item for item in [*items, text[start:].strip()] if item]
    return items if depth == 0 else [text]


def _signs(text: str) -> list[str]:
    if "\\pm" not in text:
        return [text]
    return [re.sub(r"\\pm ?", sign, text) for sign in ("+", "-")]


def _as_interval(text: str) -> str:
    """`x < 3` as `(-\\infty,3)` and `1 < x \\le 3` as `(1,3]`; anything else as it is."""
    if found := _RANGE.fullmatch(text):
        left, right = "(" if "<" in found["left"] else "[", ")" if "<" in found["right"] else "]"
        return f"{left}{found['low']},{found['high']}{right}"
    if found := _BOUND.fullmatch(text):
        bound, closed = found["bound"].strip(), found["sign"].startswith("\\")
        if found["sign"] in ("<", "\\le"):
            return f"(-\\infty,{bound}{']' if closed else ')'}"
        return f"{'[' if closed else '('}{bound},\\infty)"
    return text
