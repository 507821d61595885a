"""What a mathematical answer is counted as in a vote. Computer algebra, slow to import, is used only where needed."""

from __future__ import annotations

import re
from fractions import Fraction

from xbai.grading.boxed import final_answer
from xbai.grading.collection import signs, split_list
from xbai.grading.latex import clean, compact, in_radians, in_words, without_text_commands
from xbai.grading.quantity import parse_quantity, split_unit

_NAME = (
    r"(?:m ?)?\\angle ?[A-Za-z]+|\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([A-Za-z, ]+\))?"
    r"|\\text ?\{[^{}]*\}|(?P<unknowns>\([A-Za-z](?: ?, ?[A-Za-z])+\))"
)
_NAMED = re.compile(rf"(?P<name>{_NAME}) ?(?:=|\\in(?![A-Za-z])) ?(?P<value>[^=<>]+)")
# Relations, ratios, bases of numerals, derivatives, mixed numbers, and powers too large to be written out.
_NO_FORMULA = re.compile(
    r"[=<>:;'%]|!!|\d ?_|(?<![_^\d])\d+ \d|\d ?\\frac ?\{ ?\d|\^ ?\{? ?\d+ ?\^|\^ ?\{? ?\d{6}"
    r"|\\(?:le|ge|ne|in|to|approx|equiv|sim|subset\w*|mid|prime|infty|text|[lc]?dots|overline|emptyset|varnothing)(?![A-Za-z])"
)
LARGEST_ROUNDING = 1e-3
_NO_UNIT = (None, "degree")


def math_key(response: str) -> str | None:
    """What the boxed final answer of `response` votes for; None without one."""
    answer = final_answer(response)
    return None if answer is None else key_of_answer(answer)


def key_of_answer(answer: str) -> str:
    """The same key for answers that are certainly equal: equal numbers, constants, formulas, lists in any order.

    Names (`x = 5`) and degrees are dropped. What the grader calls equal beyond that has keys of its own (see
    `AnswerGroups`). May take for ever on a hostile answer, unless `is_plain`.
    """
    return _key(clean(answer))


def text_key(answer: str) -> str:
    """The key of an answer that is only equal to what is spelled like it."""
    return f"latex {compact(clean(answer))}"


def is_plain(answer: str) -> bool:
    """Whether the key is found without computer algebra: a number or words."""
    return _plain_key(_without_name(clean(answer))) is not None


def surely_differ(key: str, other: str) -> bool:
    """Whether two different keys tell that no grader calls their answers equal.

    They are of numbers without a unit, or of formulas with the same variables, whose real values differ by more than
    any rounding. (Complex ones may be roots that the grader takes for real.)
    """
    (names, value), (other_names, other_value) = _value(key), _value(other)
    if names is None or names != other_names or value.imag or other_value.imag:
        return False
    return abs(value - other_value) > LARGEST_ROUNDING * max(abs(value), abs(other_value))


def _key(text: str) -> str:
    text = _without_name(text)
    if plain := _plain_key(text):
        return plain
    items, brackets = _items(text)
    if items:
        return _key_of_items(items, brackets)
    return _formula_key(text) or text_key(text)


def _plain_key(text: str) -> str | None:
    if quantity := parse_quantity(text) or parse_quantity(without_text_commands(text)):
        return _number_key(quantity.value, quantity.unit)
    words = in_words(text)
    return f"words {words}" if words else None


def _number_key(value: Fraction, unit: str | None) -> str:
    return f"number {value} {'' if unit in _NO_UNIT else unit}"


def _without_name(text: str) -> str:
    named = _NAMED.fullmatch(text)
    if not named:
        return text
    unknowns = re.findall("[A-Za-z]", named["unknowns"] or "")
    # (y,x)=(1,2) is not (1,2).
    return named["value"] if unknowns == sorted(set(unknowns)) else text


def _formula_key(text: str) -> str | None:
    value, unit = split_unit(in_radians(text))
    if not value or _NO_FORMULA.search(value):
        return None
    from xbai.grading.fingerprint import fingerprint

    found = fingerprint(value)
    if isinstance(found, Fraction):
        return _number_key(found, unit)
    return found and f"formula {found} {'' if unit in _NO_UNIT else unit}".rstrip()


def _key_of_items(items: list[str], brackets: str) -> str:
    named = [_NAMED.fullmatch(item) for item in items]
    # The values of several unknowns are told apart by their names.
    several_unknowns = len({compact(item["name"]) for item in named if item}) > 1
    keys = [
        f"{compact(item['name'])}={_key(item['value'])}" if item and several_unknowns else _key(text)
        for item, text in zip(named, items, strict=True)
    ]
    if brackets:
        return f"tuple {brackets} {keys}"
    # A set of one number is graded as the number.
    return keys[0] if len(keys) == 1 and keys[0].startswith(("number", "formula")) else f"list {sorted(keys)}"


def _items(text: str) -> tuple[list[str], str]:
    """The parts of a list, set or union (without brackets), tuple or interval (with them); none of a single answer."""
    items = split_list(without_text_commands(text))
    if len(items) == 1 and text.startswith("\\{") and text.endswith("\\}"):
        items = split_list(text[2:-2])
        return [case for item in items for case in signs(item)], ""
    if len(items) > 1 or "\\pm" in text:
        return [case for item in items for case in signs(item)], ""
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        items = split_list(text[1:-1])
        return (items, text[0] + text[-1]) if len(items) > 1 else ([], "")
    return [], ""


def _value(key: str) -> tuple[str | None, complex]:
    """The variables of a key and its value, of a formula that at positive numbers; None where it has none."""
    kind, _, rest = key.partition(" ")
    try:
        if kind == "number" and rest.endswith(" "):
            return "", complex(Fraction(rest))
        if kind == "formula" and not rest.startswith("matrix"):
            names, _, values = rest.rpartition(": ")
            return names, complex(*list(map(float, values.split()))[:2])
    except (ValueError, OverflowError):
        pass  # A unit, or a number too large for floating point.
    return None, 0j
