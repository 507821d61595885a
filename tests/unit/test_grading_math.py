"""A corpus of right and wrong answers, with the traps that graders are known to fall into."""

import pytest

from xbai.errors import UserError
from xbai.grading import GradeRequest, grade
from xbai.grading.boxed import last_boxed
from xbai.grading.math import grade_math, same_answer

RIGHT = [
    # integers
    ("204", "204"),
    ("016", "16"),
    ("16", "016"),
    ("+7", "7"),
    ("-3", "-3"),
    ("−3", "-3"),
    ("5.", "5"),
    ("5.0", "5"),
    ("$42$", "42"),
    (r"\(42\)", "42"),
    ("{42}", "42"),
    # thousands separators
    ("1,234", "1234"),
    (r"1{,}234", "1234"),
    (r"1\,234", "1234"),
    (r"1,\!234,\!567", "1234567"),
    ("12 345", "12345"),
    # decimals and fractions
    ("0.5", r"\frac{1}{2}"),
    (".5", "0.50"),
    ("1/2", r"\frac12"),
    (r"\dfrac{2}{4}", r"\tfrac{1}{2}"),
    (r"-\frac{3}{4}", r"\frac{-3}{4}"),
    (r"2\frac{1}{2}", r"\frac{5}{2}"),
    ("2 1/2", "2.5"),
    (r"0.\overline{3}", r"\frac{1}{3}"),
    ("½", "0.5"),
    # percent, currency, units
    (r"50\%", "50"),
    (r"50\%", "0.5"),
    ("50 percent", r"50\%"),
    (r"\$18.90", "18.90"),
    (r"5 \text{ cm}", "5"),
    (r"5\text{ cm}^2", r"5\ \mathrm{cm}^2"),
    ("12 square feet", r"12\text{ ft}^2"),
    ("30 minutes", r"30\text{ min}"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", r"90\text{ degrees}"),
    (r"3\sqrt{2} \text{ cm}", r"\sqrt{18}"),
    (r"12_8", r"12_{8}"),
    ("12", "12_8"),
    # names before the value
    ("x = 5", "5"),
    (r"f(x) = 2x+1", "2x+1"),
    (r"x \in (1,2)", "(1, 2)"),
    ("y=2x+1", "y = 1+2x"),
    # expressions
    (r"\frac{\sqrt2}{2}", r"\frac{1}{\sqrt{2}}"),
    ("2π", r"2\pi"),
    (r"\pi\cdot 2", r"2\pi"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"10^{3}", "1000"),
    (r"1.5\times 10^{3}", "1500"),
    ("5!", "120"),
    (r"\binom{5}{2}", "10"),
    ("3+2i", "2i+3"),
    ("(5)", "5"),
    (r"\sqrt 3", r"\sqrt{3}"),
    (r"e^{\ln 2}", "2"),
    # tuples, sets, lists, intervals
    ("(1, 2)", r"\left(1,2\right)"),
    (r"\left(\frac12, 3\right)", "(0.5, 3)"),
    (r"\{2, 1\}", r"\{1,2\}"),
    ("2, -1", "-1, 2"),
    (r"-1 \text{ and } 2", "2,-1"),
    (r"x=1 \text{ or } x=2", "1,2"),
    (r"1, 2, \text{ and } 3", "3,2,1"),
    (r"\pm 2", "-2, 2"),
    (r"1 \pm \sqrt{2}", r"1+\sqrt2, 1-\sqrt2"),
    (r"(-\infty, 2]", r"\left(-\infty,2\right]"),
    (r"(2,+\infty)", r"(2,\infty)"),
    (r"(-\infty,1)\cup(3,\infty)", r"(3, \infty) \cup (-\infty, 1)"),
    ("x > 3", r"(3,\infty)"),
    (r"1 < x \leq 3", "(1,3]"),
    ("2 < x", "x > 2"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    # words and letters
    (r"\text{Yes}", "yes"),
    (r"\textbf{No solution}", "no solution"),
    (r"\text{(B)}", "B"),
    (r"\mathrm{even}", r"\text{even}"),
    (r"\text{Monday.}", "Monday"),
]

WRONG = [
    ("17", "16"),
    ("160", "16"),
    ("-16", "16"),
    ("1,2", "12"),
    ("(1,234)", "1234"),
    ("1234.5", "1234"),
    ("0.333", r"\frac{1}{3}"),
    (r"\frac{2}{1}", r"\frac{1}{2}"),
    (r"\frac{1}{0}", "0"),
    ("3.14", r"\pi"),
    (r"0.5\%", "0.5"),
    (r"5\%", "50"),
    ("5 cents", r"5\text{ dollars}"),
    (r"5 \text{ m}", r"5\text{ km}"),
    (r"5 \text{ cm}", r"5\text{ cm}^2"),
    (r"3\text{ p.m.}", r"3\text{ a.m.}"),
    ("5x", "5"),
    ("12_9", "12_8"),
    ("x = 5", "6"),
    ("y = 2x", "y = 3x"),
    (r"\sqrt{3}", r"\sqrt{2}"),
    ("2x+1", "2x-1"),
    ("(x+1)^2", "x^2+1"),
    ("(2, 1)", "(1, 2)"),
    ("(1,2)", "(1,2]"),
    ("[1,2]", "(1,2)"),
    (r"\{1,2\}", "(1,2)"),
    ("1", "1,2"),
    ("1,2,2", "1,2"),
    ("2", r"\pm 2"),
    (r"x \ge 3", r"(3,\infty)"),
    (r"(-\infty,1)", r"(-\infty,1)\cup(3,\infty)"),
    (r"\text{odd}", r"\text{even}"),
    (r"\text{No}", r"\text{Yes}"),
    ("C", "B"),
    (r"\text{(A)}", "B"),
    ("a-b", "ab"),
    (r"\frac{", "1"),
    (r"\text{none}", "0"),
    ("", "0"),
    ("?", "5"),
    (r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
]


@pytest.mark.parametrize("answer,truth", RIGHT)
def test_right(answer, truth):
    assert grade_math(f"So it is \\boxed{{{answer}}}.", truth)


@pytest.mark.parametrize("answer,truth", WRONG)
def test_wrong(answer, truth):
    assert not grade_math(f"So it is \\boxed{{{answer}}}.", truth)


@pytest.mark.parametrize("answer,truth", [case for case in RIGHT if case not in [("12", "12_8"), (r"50\%", "0.5")]])
def test_equality_does_not_depend_on_the_side(answer, truth):
    assert same_answer(truth, answer)


@pytest.mark.parametrize(
    "response,truth,right",
    [
        ("\\boxed{1} no, \\boxed{2}", "2", True),
        ("\\boxed{1} no, \\boxed{2}", "1", False),
        ("<think>\\boxed{3}</think> It is \\boxed{4}.", "4", True),
        ("<think>\\boxed{3}</think> It is 3.", "3", False),
        ("<think> cut off \\boxed{3}", "3", True),
        ("\\boxed{3} or rather \\boxed{\\frac{1}{2}", "3", False),
        ("\\boxed{\\frac{1}{2}}", "0.5", True),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}", True),
        ("\\boxed{\\text{x is }\\boxed{5}}", "5", True),
        ("\\boxed 7", "7", True),
        ("\\fbox{7}", "7", True),
        ("the answer is 7", "7", False),
        ("", "7", False),
        ("\\boxed{7}", "\\boxed{7}", True),
        ("\\boxed{" + "9" * 5000 + "}", "9", False),
        ("\\boxed{" + "(" * 900 + "}", "9", False),
    ],
)
def test_which_answer_counts(response, truth, right):
    assert grade_math(response, truth) is right


def test_last_boxed_skips_escaped_braces():
    assert last_boxed(r"\boxed{\{1\}, {2}}") == r"\{1\}, {2}"
    assert last_boxed(r"\boxed{a\}") is None


@pytest.mark.parametrize(
    "source",
    ["aime24", "math500", "HuggingFaceH4/MATH-500", "openai/gsm8k", "deepscaler", "numina-math", "openr1-math"],
)
@pytest.mark.parametrize("truth", ["16", 16, 16.0, {"target": "16"}, {"target": 16}])
def test_dispatch(source, truth):
    assert grade(GradeRequest(source, "\\boxed{016}", truth)) == 1.0
    assert grade(GradeRequest(source, "\\boxed{17}", truth)) == 0.0


def test_an_unknown_source_names_the_known_ones():
    with pytest.raises(UserError, match=r"'sudoku'.*make10\*.*ceval\*"):
        grade(GradeRequest("sudoku", "", ""))
