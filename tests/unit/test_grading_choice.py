import json
import re
from pathlib import Path

import pytest
from clocks import cpu_seconds

from xbai.grading import GradeRequest, answer_key, grade
from xbai.grading.choice import chosen_option

CASES = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "cases" / "choice.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize(
    "response,letter",
    [
        ("一步一步思考……\nANSWER: C", "C"),
        ("ANSWER：C", "C"),
        ("ANSWER: C.", "C"),
        ("**ANSWER: C**", "C"),
        ("ANSWER: **C**", "C"),
        ("ANSWER: (C)", "C"),
        ("ANSWER: $C$", "C"),
        ("ANSWER: $\\boxed{C}$", "C"),
        ("'ANSWER: C'", "C"),
        ("Answer: C. 监听介质", "C"),
        ("答案：C", "C"),
        ("答案:C", "C"),
        ("答案： Ｃ", "C"),
        ("答案是C。", "C"),
        ("正确答案为（C）", "C"),
        ("答案是：选项C", "C"),
        ("因此，故选C。", "C"),
        ("\\boxed{C}", "C"),
        ("\\boxed{\\text{C}}", "C"),
        ("\\boxed{(C) 监听介质}", "C"),
        ("C", "C"),
        ("C.", "C"),
        ("答案：A\n重新考虑，答案：C", "C"),
        ("\\boxed{A} 不对。答案：C", "C"),
        ("<think>答案：A</think>答案：C", "C"),
        ("答案选择C", "C"),
        ("答案选C", "C"),
        ("因此选择C", "C"),
        ("故选：C", "C"),
        ("所以选 C。", "C"),
        ("故选选项C", "C"),
        ("正确选项是C", "C"),
        ("正确选项：C", "C"),
        ("综上所述，正确答案应为选项C。", "C"),
        ("**答案**：\n\n**C. 监听介质**", "C"),
        ("答案：B\n\n解析：选项A错误，因为速度快；选项C与题意不符。", "B"),
        ("ANSWER: B\n解释: 选项C是干扰项", "B"),
        ("正确答案是B。选项D错误。", "B"),
        ("答案：B（选项A是干扰项）", "B"),
        ("ANSWER: B\n\n其他选项（A、C、D）都不对", "B"),
        ("ANSWER: B\n不应选A，因为速度快", "B"),
        ("分析：选项A正确。选项D错误。", None),
        ("综上，选项A错误，选项B错误，选项C错误", None),
        ("<think>答案：C</think>不知道", None),
        ("A 和 C 都有可能", None),
        ("ANSWER: A or C", None),
        ("ANSWER: AC", None),
        ("答案：A、C", None),
        ("ANSWER: $LETTER", None),
        ("The answer is a triangle", None),
        ("", None),
    ],
)
def test_chosen_option(response, letter):
    assert chosen_option(response) == answer_key("ceval", response) == letter


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['kind']}-{case['response']}")
def test_ways_of_naming_an_option(case):
    assert chosen_option(case["response"]) == case["option"]


@pytest.mark.parametrize("letter", "ABD")
def test_every_letter_is_named_in_the_same_ways(letter):
    responses = [
        case["response"] for case in CASES if re.findall("[A-J]", case["response"]) == [case["option"]] == ["C"]
    ]
    assert len(responses) > 80
    assert [text for text in responses if chosen_option(text.replace("C", letter)) != letter] == []


@pytest.mark.parametrize(
    "piece",
    ["A B ", "选", "答案", "answer is ", "选项A正确。", "正确的是A.", "A. x\n", "** ", "(", "so i ", "\\boxed{", "A是"],
)
def test_hostile_texts_take_no_time(piece):
    assert cpu_seconds(chosen_option, piece * (40_000 // len(piece))) < 5


def test_grade():
    assert grade(GradeRequest("ceval", "答案：B", "B")) == 1.0
    assert grade(GradeRequest("ceval", "答案：B", {"target": "b"})) == 1.0
    assert grade(GradeRequest("ceval", "答案：B", "C")) == 0.0
    assert grade(GradeRequest("ceval", "不知道", "C")) == 0.0
