"""A corpus of right and wrong answers, with the traps that graders are known to fall into."""

import random
from collections import defaultdict

import pytest

from xbai.errors import UserError
from xbai.grading import GradeRequest, answer_key, grade
from xbai.grading.boxed import last_boxed
from xbai.grading.latex import clean
from xbai.grading.math import grade_math, same_answer
from xbai.grading.quantity import parse_quantity

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
    # more of the same, in forms that models and data sets use
    ("007", "7"),
    (r"\text{016}", "16"),
    ("16.00", "16"),
    ("1{,}000{,}000", "1000000"),
    ("1,000,000", "10^6"),
    (r"1\;234", "1234"),
    ("12,345.67", "12345.67"),
    (r"\$1{,}250", "1250"),
    (r"3.5\times10^{-2}", "0.035"),
    (r"\frac{7}{2}", "3.5"),
    (r"\frac{-1}{2}", r"-\frac12"),
    (r"-\dfrac{1}{2}", r"\frac{1}{-2}"),
    ("7/2", r"3\frac12"),
    (r"\frac{6}{4}", r"\frac{3}{2}"),
    (r"\frac{\pi}{4}", r"\pi/4"),
    (r"\dfrac{\pi}{4}", r"\frac{1}{4}\pi"),
    (r"0.25\pi", r"\frac{\pi}{4}"),
    (r"25\%", r"\frac{1}{4}"),
    (r"33\frac{1}{3}\%", r"33\frac13"),
    (r"12.5\text{ percent}", r"12.5\%"),
    (r"10\text{ cm}", "10 cm"),
    (r"10 \mathrm{~cm}", "10"),
    (r"10\text{ centimeters}", r"10\text{ cm}"),
    (r"36\text{ square units}", "36"),
    (r"24\text{ cm}^3", "24"),
    (r"5\text{ dollars}", r"\$5"),
    (r"30^\circ", "30"),
    (r"\frac{\pi}{6}\text{ radians}", r"\frac{\pi}{6}"),
    (r"x=\frac{1}{2}", "0.5"),
    ("n = 12", "12"),
    (r"P(A) = \frac{1}{6}", "1/6"),
    (r"S = \{1, 2, 3\}", r"\{3, 2, 1\}"),
    (r"(3, \frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"),
    ("(1,-2,3)", "(1, -2, 3)"),
    ("[0, 1)", r"\left[0,1\right)"),
    (r"[-2,-1]\cup[1,2]", r"[1,2]\cup[-2,-1]"),
    (r"x \in [-2, 7]", "[-2,7]"),
    (r"x \le 4", r"(-\infty, 4]"),
    (r"-1 \leq x < 5", "[-1,5)"),
    (r"(-\infty,0)\cup(0,\infty)", r"(-\infty,0) \cup (0,+\infty)"),
    ("1, 2, 3", "3, 1, 2"),
    ("x = 1, y = 2", "x=1, y=2"),
    (r"2 \text{ or } -3", "-3, 2"),
    (r"\pm \sqrt{5}", r"\sqrt5, -\sqrt5"),
    (r"3 \pm i", "3+i, 3-i"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    (r"\sqrt[3]{8}", "2"),
    ("2^{10}", "1024"),
    (r"\log_2 8", "3"),
    (r"\cos 60^\circ", r"\frac{1}{2}"),
    (r"\frac{1+\sqrt5}{2}", r"\frac{\sqrt{5}+1}{2}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    ("x^2 - 4", "(x-2)(x+2)"),
    ("a+b", "b+a"),
    (r"\frac{x}{y}", "x/y"),
    (r"\text{east}", r"\text{East}"),
    (r"\textbf{(C)}", "C"),
    ("(E)", r"\text{E}"),
    (r"\text{no real solutions}", r"\text{No real solutions}"),
    (r"\text{Friday}", "Friday"),
    (r"\text{Alice, Bob}", r"\text{Bob, Alice}"),
    ("6:00", "6:00"),
    ("06:00", "6:00"),
    ("6:00 PM", "6:00"),
    (r"3:00\text{ p.m.}", "3:00 pm"),
    ("3:2", "3:2"),
    (r"11{,}\! 111", "11111"),
    (r"\boxed{5}", "5"),
    (r"\infty", r"+\infty"),
    ("i", "i"),
    ("-2 + 3i", "3i - 2"),
    (r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    (r"2\cdot 3^4", "162"),
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
    ("5:00", "6:00"),
    ("6", "6:00"),
    ("42", "10:00"),
    ("1:00", "10:00"),
    ("7", r"3:00\text{ p.m.}"),
    (r"3:00\text{ a.m.}", r"3:00\text{ p.m.}"),
    ("6:00", "12"),
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
    # more of the same
    ("18", "16"),
    ("0160", "16"),
    ("1.6", "16"),
    ("1,234", "1.234"),
    ("1,234", "12,34"),
    ("1000", "1,001"),
    ("1/3", "0.33"),
    (r"\frac{3}{2}", r"\frac{2}{3}"),
    (r"3\frac12", r"\frac{3}{2}"),
    (r"\pi", "3"),
    (r"2\pi", r"\pi"),
    (r"\pi^2", r"\pi"),
    (r"\frac{22}{7}", r"\pi"),
    (r"25\%", "0.5"),
    (r"0.25\%", "25"),
    (r"7\text{ cm}", r"7\text{ m}"),
    (r"7\text{ cm}^2", r"7\text{ cm}^3"),
    (r"5\text{ minutes}", r"5\text{ hours}"),
    (r"30^\circ", r"30\text{ radians}"),
    ("(0,1)", "[0,1]"),
    ("(0,1]", "[0,1)"),
    ("(1,0)", "(0,1)"),
    ("(1,2)", "(1,2,3)"),
    ("(1,2)", r"\{1,2,3\}"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("x < 4", r"(-\infty, 4]"),
    ("x > 4", r"(-\infty, 4)"),
    (r"(-\infty, 4)", r"(-\infty, 4]"),
    (r"[1,2]\cup[3,4]", "[1,4]"),
    ("1, 2", "1, 3"),
    ("1", r"\pm 1"),
    (r"\pm 1", "1"),
    (r"\sqrt{2}", "2"),
    (r"\sqrt{2}", "1.414"),
    (r"\sqrt[3]{2}", r"\sqrt{2}"),
    ("x^2", "x^3"),
    ("x+1", "x"),
    ("ab", "a+b"),
    ("2x", "2y"),
    ("i", "-i"),
    (r"\text{west}", r"\text{east}"),
    (r"\text{True}", r"\text{False}"),
    (r"\text{A and B}", "A"),
    ("D", "C"),
    (r"\text{none of the above}", "A"),
    ("10_2", "10_3"),
    ("3:2", "2:3"),
    (r"\infty", r"-\infty"),
    (r"\infty", "10"),
    (r"42 \text{ or } 43", "42"),
    ("x", "5"),
    (r"\text{undefined}", "0"),
    ("5-", "5"),
    (r"\frac{1}{2", r"\frac{1}{2}"),
    ("12 apples and 3 pears", "12"),
    (r"\emptyset", "0"),
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


@pytest.mark.parametrize("truth", [None, "", " ", {}, {"target": None}, {"target": ""}, float("nan"), True, ["5"]])
@pytest.mark.parametrize("source", ["math500", "ceval", "make10", "livecodebench"])
def test_without_the_right_answer_there_is_no_grade(source, truth):
    with pytest.raises(ValueError, match="the right answer is not known"):
        grade(GradeRequest(source, "\\boxed{\\text{None}}", truth))


def boxed_key(answer):
    return answer_key("math500", f"\\boxed{{{answer}}}")


def exact(text):
    quantity = parse_quantity(clean(text))
    return quantity and (quantity.value, quantity.unit)


def test_exactly_equal_answers_vote_together():
    pairs = [(exact(answer), exact(truth), answer, truth) for answer, truth in RIGHT]
    same = [(answer, truth) for first, second, answer, truth in pairs if first and first == second]
    assert len(same) > 40
    assert [pair for pair in same if boxed_key(pair[0]) != boxed_key(pair[1])] == []


@pytest.mark.parametrize(("answer", "truth"), WRONG)
def test_different_answers_vote_apart(answer, truth):
    assert boxed_key(answer) != boxed_key(truth) or boxed_key(answer) is None


def test_answers_that_vote_together_get_the_same_grade():
    together = defaultdict(list)
    for answer in dict.fromkeys(text for pair in RIGHT + WRONG for text in pair):
        together[boxed_key(answer)].append(answer)
    together.pop(None)
    # Ratios are read as times, too; names, which votes leave out, matter where the right answer has one.
    truths = [truth for _, truth in RIGHT + WRONG if ":" not in truth and "=" not in truth]
    choice = random.Random(0)
    for answers in together.values():
        if len(answers) > 1:
            for truth in choice.sample(truths, 4):
                grades = {grade_math(f"\\boxed{{{answer}}}", truth) for answer in (answers[0], answers[-1])}
                assert len(grades) == 1, (answers, truth)


@pytest.mark.parametrize(
    ("response", "key"),
    [
        ("<think>\\boxed{3}</think> \\boxed{ 7 + x }", boxed_key("x+7")),
        ("\\boxed{1,234}", "number 1234 "),
        ("\\boxed{\\text{(B)}}", "words B"),
        ("<think>\\boxed{3}</think> It is 3.", None),
        ("ANSWER: B", None),
        ("\\boxed{}", None),
        ("\\boxed{" + "1" * 5000 + "}", None),
    ],
)
def test_what_a_response_votes_for(response, key):
    assert answer_key("aime24", response) == key


def test_votes_of_other_tasks():
    assert answer_key("make10", "<think>\\boxed{7 + 3}") == "7+3"
    assert answer_key("livecodebench", "The answer is A[i]") is None


def test_an_unknown_source_names_the_known_ones():
    with pytest.raises(UserError, match=r"'sudoku'.*make10\*.*ceval\*"):
        grade(GradeRequest("sudoku", "", ""))
