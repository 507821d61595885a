"""Mathematical answers by their value, whatever its size and however it is written; see docs/evaluation.md."""

import json
import random
import time
from fractions import Fraction
from math import comb, perm
from pathlib import Path

import pytest
from sympy import Integer, Integral, Symbol

from xbai.grading import GradeRequest, grade
from xbai.grading.boxed import final_answer
from xbai.grading.math import grade_math, same_answer
from xbai.grading.numeric import same_values
from xbai.grading.symbolic import symbolically_equal

CASES = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "cases/math_values.jsonl").read_text(encoding="utf-8").splitlines()
]
FORMULAS = [case for case in CASES if case["kind"] != "sentence"]


def name(case):
    return f"{case['kind']}: {case['answer']} for {case['truth']}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_values(case):
    assert grade_math(f"\\boxed{{{case['answer']}}}", case["truth"]) is case["right"]


def test_equality_does_not_depend_on_the_side():
    differing = [name(case) for case in FORMULAS if same_answer(case["truth"], case["answer"]) is not case["right"]]
    assert differing == []


class Formulas:
    """Random rational formulas in LaTeX, with their exact value by Python's fractions."""

    def __init__(self, seed):
        self._draw = random.Random(seed)

    def make(self, depth):
        if depth == 0:
            number = self._draw.randint(1, 60)
            return str(number), Fraction(number)
        kind = self._draw.choice(["+", "-", "*", "/", "^", "!", "C"])
        if kind == "^":
            base, power = self._draw.randint(2, 12), self._draw.randint(-90, 90)
            return f"{base}^{{{power}}}", Fraction(base) ** power
        if kind == "!":
            number = self._draw.randint(2, 40)
            return f"{number}!", Fraction(perm(number))
        if kind == "C":
            total = self._draw.randint(2, 60)
            chosen = self._draw.randint(1, total)
            return f"\\binom{{{total}}}{{{chosen}}}", Fraction(comb(total, chosen))
        (left, first), (right, second) = self.make(depth - 1), self.make(depth - 1)
        if kind == "/":
            return (f"\\frac{{{left}}}{{{right}}}", first / second) if second else self.make(depth)
        value = {"+": first + second, "-": first - second, "*": first * second}[kind]
        return f"\\left({left}\\right){kind.replace('*', chr(92) + 'cdot')}\\left({right}\\right)", value


@pytest.mark.parametrize("seed", range(40))
def test_rational_formulas_are_compared_exactly(seed):
    formula, value = Formulas(seed).make(3)
    top, bottom = value.as_integer_ratio()
    assert same_answer(formula, f"\\frac{{{top}}}{{{bottom}}}")
    assert not same_answer(formula, f"\\frac{{{top + 1}}}{{{bottom}}}")
    assert not same_answer(formula, f"{formula}+\\frac{{1}}{{10^{{300}}}}")
    if top:
        assert not same_answer(formula, f"\\frac{{{-top}}}{{{bottom}}}")


@pytest.mark.parametrize("seed", range(20))
def test_counts_in_every_notation(seed):
    draw = random.Random(seed)
    total = draw.randint(2, 30)
    chosen = draw.randint(1, total)
    for letter, value in (("C", comb(total, chosen)), ("A", perm(total, chosen)), ("P", perm(total, chosen))):
        for form in (
            f"{letter}_{{{total}}}^{{{chosen}}}",
            f"{letter}^{{{chosen}}}_{{{total}}}",
            f"\\mathrm{{{letter}}}_{{{total}}}^{{{chosen}}}",
            f"{{}}_{{{total}}}{letter}_{{{chosen}}}",
        ):
            assert same_answer(form, str(value))
            assert not same_answer(form, str(value + 1))


@pytest.mark.parametrize("seed", range(20))
def test_repeating_decimals(seed):
    draw = random.Random(seed)
    start, repeating = (str(draw.randint(10 ** (count - 1), 10**count - 1)) for count in (2, draw.randint(1, 5)))
    value = Fraction(int(start), 100) + Fraction(int(repeating), 100 * (10 ** len(repeating) - 1))
    first, last = repeating[0], repeating[-1]
    dotted = rf"\dot{first}{repeating[1:-1]}\dot{{{last}}}" if len(repeating) > 1 else rf"\dot{{{first}}}"
    for form in (rf"0.{start}\overline{{{repeating}}}", rf"0.{start}\bar{{{repeating}}}", f"0.{start}{dotted}"):
        assert same_answer(form, f"{value.numerator}/{value.denominator}")
        assert same_answer(rf"{form}\pi", rf"\frac{{{value.numerator}\pi}}{{{value.denominator}}}")
        assert not same_answer(form, f"0.{start}{repeating}")


@pytest.mark.parametrize(
    ("decimal", "exact", "right"),
    [
        ("3.141593", r"\pi", True),
        ("3.14159265358979", r"\pi", True),
        ("3.141592", r"\pi", False),
        ("3.14", r"\pi", False),
        (r"\pi", "3.14", False),
        ("0.333333", r"1-\frac{2}{3}", True),
        ("0.333333", r"\frac{1}{3}", False),
        ("0.000001", "e^{-13}", False),
        ("0.00000226", "e^{-13}", True),
        (r"2.2603\times 10^{-6}", "e^{-13}", True),
        (r"2.2603\times 10^{-6}", "-e^{-13}", False),
        (r"2.2603\times 10^{-6}", "e^{-14}", False),
        ("1.0", r"1-e^{-40}", False),
    ],
)
def test_decimals_stand_for_what_they_approximate(decimal, exact, right):
    assert same_answer(decimal, exact) is right


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        (r"10^{10^{10}}", r"10^{10^{10}}", True),
        (r"10^{10^{10}}", r"10^{10000000000}", True),
        (r"10^{10^{10}}", r"10^{10^{10}}+1", False),
        (r"10^{10^{10^{10}}}", r"10^{10^{10^{11}}}", False),
        (r"9^{9^{9}}", r"9^{9^{9}}-1", False),
        (r"10^{-10^{10}}", "0", False),
        (r"10^{-10^{10}}", r"10^{-10^{11}}", False),
        (r"2^{1000000}", r"4^{500000}", True),
        (r"2^{1000000}", r"4^{500001}", False),
        (r"2^{20000}-1", r"4^{10000}-1", True),
        (r"2^{20000}-1", r"4^{10000}+1", False),
        (r"100000!", r"100000 \cdot 99999!", True),
        (r"1000000!", "999999!", False),
        (r"\binom{1000000000}{500000000}", "1", False),
        (r"3!!!!", "720!", False),
        (r"x^{100000}", r"(x^2)^{50000}", True),
        (r"x^{y^{z^{w}}}", r"x^{y^{z^{v}}}", False),
        (r"n^{n^{n}}", "n^{n^2}", False),
        (r"x^{10^{10^{10}}}", r"x^{10^{10}}", False),
        (r"\sqrt{x^{10^{10^{10}}}}", "x", False),
        (r"e^{e^{e^{e^{10}}}}", r"e^{e^{e^{10}}}", False),
        (r"\sin(10^{100})", r"\sin(10^{101})", False),
        (r"\left(1+\frac{1}{10^{10}}\right)^{10^{10}}", "e", False),
        (r"y=10^{10^{10^{10}}}", "y=x", False),
        (r"\sqrt{2+" * 49 + r"\sqrt{2}" + "}" * 49, r"2\cos\frac{\pi}{2^{51}}", True),
        (r"\sqrt{2+" * 49 + r"\sqrt{2}" + "}" * 49, r"2\cos\frac{\pi}{2^{50}}", False),
        (r"x^4-3.7x^3+\sqrt2 x-\pi>0", "x>2", False),
        (r"\frac{x^4+x^3-5x+1}{x^3-x+7}<0", "(0,1)", False),
    ],
)
def test_numbers_of_any_size_are_compared_at_once(answer, truth, right):
    started = time.process_time()
    assert same_answer(answer, truth) is right
    assert time.process_time() - started < 2.0


def test_what_holds_a_bound_variable_is_not_evaluated():
    x = Symbol("x")
    assert same_values(Integral(x**x, (x, 0, 1)), Integer(1)) is None


def test_entries_of_a_matrix_are_compared_like_numbers():
    assert symbolically_equal(
        *[rf"\begin{{pmatrix}} {entry} & x \end{{pmatrix}}" for entry in ("10^{-20}", "0.1^{20}")]
    )
    assert not symbolically_equal(*[rf"\begin{{pmatrix}} 10^{{-{digits}}} & x \end{{pmatrix}}" for digits in (20, 21)])


def test_a_truth_that_is_no_number_gives_no_grade():
    with pytest.raises(ValueError, match="the right answer is not a number"):
        grade(GradeRequest("math500", r"\boxed{\sqrt{2}}", r"\frac{1}{0}"))


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\fbox{7}", "7"),
        (r"<think> It is \boxed{7}, wait", "7"),
        (r"<think> It is \boxed{7}.</think> The answer is 7.", None),
        (r"<think> It is \boxed{7}.</think> \boxed{8}", "8"),
        (r"\boxed{\text{The answer is 5.}}", "5"),
        (r"\boxed{\text{The answer is } \frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\text{The number is even}}", r"\text{The number is even}"),
        (r"\boxed{5} is right", "5"),
    ],
)
def test_what_a_response_answers(response, answer):
    assert final_answer(response) == answer
