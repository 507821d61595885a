"""The forms that mathematical answers come in: equations, named points, sets of reals, options with their text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from xbai.grading.math import grade_math

CASES = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "cases/math_forms.jsonl").read_text(encoding="utf-8").splitlines()
]
RIGHT = [case for case in CASES if case["same"]]


def name(case):
    return f"{case['form']}: {case['answer']} for {case['truth']}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_forms(case):
    assert grade_math(f"\\boxed{{{case['answer']}}}", case["truth"]) is case["same"]


@pytest.mark.parametrize("case", RIGHT, ids=name)
def test_equality_does_not_depend_on_the_side(case):
    assert grade_math(f"\\boxed{{{case['truth']}}}", case["answer"])


def test_plain_answers_need_no_computer_algebra():
    pairs = [
        ("1,234", "1234"),
        ("x=5", "5.0"),
        (r"\text{(B)}", "B"),
        (r"\textbf{(B)}\ 12", "12"),
        ("m=3, n=4", "(3,4)"),
    ]
    program = (
        "import sys; from xbai.grading.math import same_answer;"
        f"assert all(same_answer(*pair) for pair in {pairs!r}); assert 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
