"""Which grader a data source gets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from xbai.errors import UserError
from xbai.grading.code import grade_code
from xbai.grading.dispatch import ANSWER_CHECKS, NOT_GRADED, GradeRequest, answer_check, grade
from xbai.grading.math import grade_math

TRAINING = Path(__file__).parents[2] / "docs/training.md"

PUBLIC = (
    *("openai/gsm8k", "lighteval/MATH", "DigitalLearningGmbH/MATH-lighteval"),
    *("numina_aops_forum", "numina_synthetic_math", "numina_amc_aime"),
    *("numina_synthetic_amc", "numina_cn_k12", "numina_olympiads"),
    *("math", "ys_train", "deepscaler"),
)
"""Data sources of mathematics in the grader tables of MetaStone-S1 and verl 0.3."""


@pytest.mark.parametrize("source", PUBLIC)
def test_public_sources_of_mathematics_are_graded_as_mathematics(source: str):
    assert answer_check(source) is grade_math
    assert grade(GradeRequest(source, r"<think> 1 </think> \boxed{\frac12}", {"target": "0.5"})) == 1
    assert grade(GradeRequest(source, r"<think> 1 </think> \boxed{2}", {"target": "0.5"})) == 0


@pytest.mark.parametrize(
    "source", ["codecontests", "apps", "codeforces", "taco", "kk_logic", "code_syn", "code_synthetic_v2", "BAAI/TACO"]
)
def test_public_sources_without_a_grader_are_refused_before_anything_starts(source: str):
    with pytest.raises(UserError, match=rf"data_source '{source}': .*; set custom_reward_function"):
        answer_check(source)


@pytest.mark.parametrize("source", ["code", "my/code_tests", "livecodebench_v5"])
def test_other_code_is_still_code(source: str):
    assert answer_check(source) is grade_code


def test_the_documentation_lists_them_all():
    section = TRAINING.read_text(encoding="utf-8").partition("### Data sources")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`([\w/-]+)`", section))
    assert {*PUBLIC, *NOT_GRADED} <= listed
    assert all(any(f"`{prefix}" in section for prefix in (name, f"{name}*")) for name in ANSWER_CHECKS)
