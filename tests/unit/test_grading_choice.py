import pytest

from xbai.grading import GradeRequest, answer_key, grade
from xbai.grading.choice import chosen_option


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


def test_grade():
    assert grade(GradeRequest("ceval", "答案：B", "B")) == 1.0
    assert grade(GradeRequest("ceval", "答案：B", {"target": "b"})) == 1.0
    assert grade(GradeRequest("ceval", "答案：B", "C")) == 0.0
    assert grade(GradeRequest("ceval", "不知道", "C")) == 0.0
