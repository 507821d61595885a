"""Which answers vote together."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

from xbai.grading import AnswerGroups, CustomGrader, answer_groups
from xbai.grading.math import same_answer
from xbai.grading.math_key import key_of_answer, math_key, surely_differ

CASES = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "cases" / "votes.jsonl").read_text(encoding="utf-8").splitlines()
]

HOSTILE = """
import time

def compare(data_source, solution_str, ground_truth, extra_info):
    if "hang" in solution_str + (ground_truth or ""):
        time.sleep(60)
    return {"score": 1.0, "key": solution_str}
"""


def boxed(answer: str) -> str:
    return f"<think>\\boxed{{0}}</think> It is \\boxed{{{answer}}}."


@pytest.fixture(scope="module")
def groups() -> Iterator[AnswerGroups]:
    with AnswerGroups("math500", workers=1) as groups:
        yield groups


@pytest.mark.parametrize("case", [case for case in CASES if case["kind"] != "grader"], ids=str)
def test_equal_answers_have_the_same_key(case: dict) -> None:
    keys = [{math_key(boxed(answer)) for answer in group} for group in case["groups"]]
    assert [len(of_group) for of_group in keys] == [1] * len(keys)
    assert len(set.union(*keys)) == len(keys)


@pytest.mark.parametrize("case", [case for case in CASES if case["kind"] != "only keys"], ids=str)
def test_answers_that_the_grader_calls_equal_vote_together(groups: AnswerGroups, case: dict) -> None:
    answers = [(answer, number) for number, group in enumerate(case["groups"]) for answer in group]
    random.Random(0).shuffle(answers)
    (votes,) = groups.of([[boxed(answer) for answer, _ in answers]])
    assert len(set(zip(votes, (number for _, number in answers)))) == len(set(votes)) == len(case["groups"])


def test_keys_that_surely_differ_are_of_answers_that_the_grader_tells_apart() -> None:
    answers = random.Random(0).sample([answer for case in CASES for group in case["groups"] for answer in group], 40)
    pairs = [pair for pair in combinations(answers, 2) if surely_differ(*map(key_of_answer, pair))]
    assert len(pairs) > 100
    assert [pair for pair in pairs if same_answer(*pair) and same_answer(*pair[::-1])] == []


def test_groups_do_not_depend_on_the_order_of_the_answers(groups: AnswerGroups) -> None:
    answers = ["20", "20\\%", "0.2", "0.3", "x=20", "20^\\circ", "\\frac{1}{5}", "20\\text{ cm}"]
    expected = None
    for seed in range(5):
        random.Random(seed).shuffle(answers)
        (votes,) = groups.of([[boxed(answer) for answer in answers]])
        found = dict(zip(answers, votes))
        expected = expected or found
        assert found == expected


def test_questions_are_counted_by_themselves(groups: AnswerGroups) -> None:
    first, second = groups.of([[boxed("20"), boxed("0.2"), "no answer"], [boxed("20"), boxed("20\\%"), boxed("0.2")]])
    assert first == ["number 20 ", "number 1/5 ", None]
    assert len(set(second)) == 1
    assert groups.of([[], ["none"]]) == [[], [None]]


def test_answers_that_are_numbers_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_groups, "compare", None)
    with AnswerGroups("aime24", workers=1) as numbers:
        assert numbers.of([[boxed("5"), boxed("x=5"), boxed("005"), boxed("6")]]) == [["number 5 "] * 3 + ["number 6 "]]
    with AnswerGroups("make10") as expressions:
        assert expressions.of([["\\boxed{7+3}", "\\boxed{7 + 3}", "\\boxed{3+7}"]]) == [["7+3", "7+3", "3+7"]]
    with AnswerGroups("ceval") as letters:
        assert letters.of([["ANSWER: B", "答案：【B】", "选C", "A or B"]]) == [["B", "B", "C", None]]
    with AnswerGroups("livecodebench") as programs:
        assert programs.of([["```python\nprint(1)\n```"]]) == [[None]]


def test_what_cannot_be_compared_votes_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "hostile.py").write_text(HOSTILE, encoding="utf-8")
    monkeypatch.setattr(answer_groups, "compare", CustomGrader(str(tmp_path / "hostile.py"), "compare"))
    answers = ["hang(x)", "hang (x)", "x^2", "2x", "5\\text{ cm}", "5", "5\\text{ hang}"]
    with caplog.at_level(logging.WARNING), AnswerGroups("math500", workers=1, timeout_s=0.5) as groups:
        ((hangs, same_text, *equal, unit, number, other_unit),) = groups.of([[boxed(answer) for answer in answers]])
    # The unreadable answer is compared with nothing; everything else is equal to this grader but where it hangs.
    assert hangs == same_text == "latex hang(x)"
    assert {*equal, unit, number} == {number}
    assert other_unit not in (hangs, number)
    assert [record.message for record in caplog.records] == [
        "comparisons of answers that failed: 6 timeout; these answers vote apart"
    ]
