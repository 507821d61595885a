"""Mathematical answers: the last box of the response, compared exactly where possible and by computer algebra else.

In this order: answers are found (`boxed.py`) and spelt alike (`latex.py`, `notation.py`); numbers with their units
are read by `quantity.py`; what a form means is each form's own module, a text's reading or None (`option.py`,
`named.py`, `real_set.py`, `inequality.py`, `equation.py`, `collection.py`); what is left are formulas, which
`symbolic.py` compares, by their values at points (`numeric.py`, `evaluator.py`) before any algebra.
"""

from __future__ import annotations

import re

from xbai.grading.boxed import final_answer, last_boxed, stated_value
from xbai.grading.collection import Collection, as_tuple, closes_brackets, split, split_list
from xbai.grading.latex import clean, compact, in_radians, in_words, without_separators, without_text_commands
from xbai.grading.named import Named, as_tuples, is_point, read_solutions, rows_as_list, same_solutions, without_names
from xbai.grading.option import Option, option_letter
from xbai.grading.quantity import parse_quantity, same_unit, split_unit

_ON_THE_HOUR = re.compile(r"\d{1,2}:00")
_SET_OF_REALS = re.compile(
    r"[<>∅ℝ]|\\(?:cup|cap|setminus|smallsetminus|backslash|le|ge|ne|in|infty|emptyset|varnothing|R|Reals|reals)(?![A-Za-z])"
    r"|\\(?:mathbb|mathbf|Bbb) ?\{? ?R|\\text ?\{ ?R ?\}|\\\{ *\\\}|\breals?\b|\bempty set\b|\bno (?:real )?solution",
    re.IGNORECASE,
)
_PRIMES = re.compile(r"(?<=[A-Za-z})])'+")
_EQUALS = re.compile("=")
_RELATION = re.compile(r"[=<>]|\\[lg]e(?![A-Za-z])")


def grade_math(response: str, truth: str) -> bool:
    """Whether the boxed final answer of `response` means the same as `truth`. Without a box it is wrong."""
    answer, truth = final_answer(response), last_boxed(truth) or truth
    return answer is not None and same_answer(answer, stated_value(truth) or truth)


def same_answer(answer: str, truth: str) -> bool:
    """Whether two LaTeX answers mean the same."""
    return _same(rows_as_list(clean(answer)), rows_as_list(clean(truth)))


def _same(answer: str, truth: str) -> bool:
    if compact(answer) == compact(truth):
        return True
    number, true_number = parse_quantity(answer), parse_quantity(truth)
    if number and true_number:
        return number.equals(true_number)
    for decide in (_same_option, _same_solutions, _same_sets, _same_equations):
        decided = decide(answer, truth)
        if decided is not None:
            return decided
    value, true_value = without_names(answer, truth)
    if (value, true_value) != (answer, truth):
        return _same(value, true_value)
    decided = _same_words(answer, truth)
    if decided is not None:
        return decided
    items, true_items = Collection.parse(answer), Collection.parse(truth)
    # The commas of a list also separate thousands.
    if number and true_items is None:
        return _same_expressions(without_separators(answer), truth)
    if true_number and items is None:
        return _same_expressions(answer, without_separators(truth))
    if items:
        return items.matches(true_items or _beside(items, truth), _same)
    if true_items:
        return _beside(true_items, answer).matches(true_items, _same)
    return _same_expressions(answer, truth)


def _beside(other: Collection, text: str) -> Collection:
    """A single answer to compare with several: an inequality is an interval and a vector a tuple beside one."""
    return (Collection.parse(as_tuple(text)) if other.ordered else None) or Collection([text])


def _same_option(answer: str, truth: str) -> bool | None:
    """Compare the letter of a choice, its text, or both, whatever both sides have; None where neither has both."""
    option, true_option = Option.parse(answer), Option.parse(truth)
    if option and true_option:
        return option.letter == true_option.letter and _same_texts(option.text, true_option.text)
    given, other = (option, truth) if option else (true_option, answer)
    if given is None:
        return None
    if letter := option_letter(other):
        return given.letter == letter
    return True if given.text and _same(given.text, other) else None


def _same_texts(text: str, true_text: str) -> bool:
    """Whether the texts of one choice agree; where one is missing or in words, the letter alone counts."""
    in_prose = any(side.startswith("\\text") and in_words(side) for side in (text, true_text))
    return not text or not true_text or in_prose or _same(text, true_text)


def _same_solutions(answer: str, truth: str) -> bool | None:
    """Compare the values of several unknowns by name; None unless one side names them."""
    if "=" not in answer and "=" not in truth and "\\in" not in answer + truth:
        return None
    solutions, true_solutions = read_solutions(answer), read_solutions(truth)
    if solutions and true_solutions:
        return same_solutions(solutions, true_solutions, _same)
    if solutions and _holds_tuples(truth):
        return _same(as_tuples(solutions), truth)
    if true_solutions and _holds_tuples(answer):
        return _same(answer, as_tuples(true_solutions))
    return None


def _holds_tuples(text: str) -> bool:
    found = Collection.parse(text)
    return (found is not None and found.ordered) or all(is_point(item) for item in split_list(text))


def _same_sets(answer: str, truth: str) -> bool | None:
    """Compare sets of real numbers; None unless both are, and one could be nothing else."""
    if not (_SET_OF_REALS.search(answer) or _SET_OF_REALS.search(truth)):
        return None
    from xbai.grading.real_set import parse_real_set

    reals, true_reals = parse_real_set(answer), parse_real_set(truth)
    if reals and true_reals:
        return reals.equals(true_reals)
    known, other = (reals, truth) if reals else (true_reals, answer)
    return False if known and known.reals.is_empty and other.startswith(r"\{") else None


def _same_equations(answer: str, truth: str) -> bool | None:
    """Compare equations of curves; None where they are none, or give the same name a value."""
    if not (_RELATION.search(answer) and _RELATION.search(truth)):
        return None
    named, true_named = Named.parse(answer), Named.parse(truth)
    if named and true_named and named.same_name(true_named):
        return None
    if "\\pm" in answer and "\\pm" in truth:
        items, true_items = Collection.parse(answer), Collection.parse(truth)
        return items.matches(true_items, _same) if items and true_items else None
    from xbai.grading.equation import same_equation

    same = same_equation(answer, truth)
    # Constants of different names: f(2) = 10 is not f(3) = 10.
    return False if same is None and named and true_named and named.is_constant and true_named.is_constant else same


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
        answer = split(answer, _EQUALS)[0][-1]
    if sorted(_PRIMES.findall(answer)) != sorted(_PRIMES.findall(truth)):  # The parser leaves them out.
        return False
    if not answer or not truth or not closes_brackets(answer):
        return False
    from xbai.grading.symbolic import symbolically_equal

    return symbolically_equal(answer, truth)
