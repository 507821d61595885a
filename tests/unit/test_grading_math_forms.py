"""The forms that mathematical answers come in: equations, named points, sets of reals, options with their text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from xbai.grading.math import grade_math

CASES = [json.loads(line) for line in (Path(__file__).parents[1] / "cases/math_forms.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['form']}-{case['truth']}-{case['answer']}")
def test_forms(case):
    assert grade_math(f"\\boxed{{{case['answer']}}}", case["truth"]) is case["same"]
