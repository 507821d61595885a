"""The embedded task: its grading, its problems, its teacher and its files."""

import json
import random

import pandas as pd
import pytest

from xbai.benchmarks.make10 import (
    LARGEST_PARTIAL,
    SplitSizes,
    Teacher,
    expression,
    is_fair,
    sample_problems,
    valid_patterns,
    write_splits,
)
from xbai.benchmarks.registry import get_benchmark
from xbai.errors import UserError
from xbai.grading import grade
from xbai.grading.make10 import boxed_expression, grade_make10

FLAWLESS = Teacher(
    attempt_weights=(0,) * 15 + (1,),
    missed_hit_rate=0,
    false_yes_rate=0,
    slip_rate=0,
)
SMALL = SplitSizes(sft=60, sft_problems=40, train=30, validation=10, test=20)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("7+8-1+1-5", True),
        (" 7 + 8 - 1 + 1 - 5 ", True),
        ("7+8-1-1-5", False),  # makes 8
        ("8+7-1+1-5", False),  # another order
        ("7+8-5", False),  # makes 10, but not from all numbers
        ("7+8-1+1-5+0", False),
        ("+7+8-1+1-5", False),
        ("7+8-1+1--5", False),
        ("7+8-(1-1)-5", False),
        ("10", False),
        ("", False),
        ("__import__('os')", False),
    ],
)
def test_grading_reads_the_boxed_expression(answer, right):
    assert grade_make10(f"<think>\n</think>\n\nThe answer is \\boxed{{{answer}}}.", "7 8 1 1 5") is right


def test_last_box_counts_and_none_is_wrong():
    response = "\\boxed{7+8-1-1-5} or \\boxed{7+8-1+1-5}"
    assert boxed_expression(response) == "7+8-1+1-5"
    assert grade_make10(response, "7 8 1 1 5")
    assert not grade_make10("7+8-1+1-5", "7 8 1 1 5")


def test_partial_results_out_of_range_do_not_matter():
    assert grade_make10("\\boxed{1-9+9+9}", "1 9 9 9")


def test_valid_patterns_are_those_whose_partial_results_stay_in_range():
    assert valid_patterns((1, 2, 9)) == {"++": 12}
    assert valid_patterns((9, 9, 1, 1))["+-+"] == 18
    assert all(0 <= result <= LARGEST_PARTIAL for result in valid_patterns((9, 9, 9, 1, 1)).values())


def test_sampled_problems_are_fair_and_different():
    problems = sample_problems(200, random.Random(0))
    assert len(set(problems)) == 200
    assert all(is_fair(numbers) for numbers in problems)
    with pytest.raises(UserError, match="different problems of 2 numbers"):
        sample_problems(1000, random.Random(0), length=2)


def test_teacher_without_noise_is_always_right():
    rng = random.Random(0)
    for numbers in sample_problems(100, rng):
        response = FLAWLESS.solve(numbers, rng)
        assert grade_make10(response, " ".join(map(str, numbers))), response


def test_noisy_teacher_is_right_about_half_the_time():
    rng = random.Random(0)
    problems = sample_problems(500, rng)
    right = [grade_make10(Teacher().solve(numbers, rng), " ".join(map(str, numbers))) for numbers in problems]
    assert 0.4 < sum(right) / len(right) < 0.55


def test_splits_share_no_problem_and_follow_the_seed(tmp_path):
    files = write_splits(tmp_path / "a", seed=3, sizes=SMALL)
    again = write_splits(tmp_path / "b", seed=3, sizes=SMALL)
    other = write_splits(tmp_path / "c", seed=4, sizes=SMALL)
    sft, train, validation = (pd.read_parquet(files[f"{name}.parquet"]) for name in ("sft", "train", "val"))
    test = [json.loads(line) for line in files["test.jsonl"].read_text(encoding="utf-8").splitlines()]

    problems = [{row["ground_truth"] for row in frame.reward_model} for frame in (sft, train, validation)]
    problems.append({line["answer"] for line in test})
    assert [len(part) for part in problems] == [40, 30, 10, 20]
    assert len(set.union(*problems)) == 100

    assert (
        files["test.jsonl"].read_text(encoding="utf-8")
        == again["test.jsonl"].read_text(encoding="utf-8")
        != other["test.jsonl"].read_text(encoding="utf-8")
    )
    assert sft.response.tolist() == pd.read_parquet(again["sft.parquet"]).response.tolist()


def test_rows_are_graded_by_the_grader_of_their_data_source(tmp_path):
    files = write_splits(tmp_path, seed=0, sizes=SMALL)
    sft = pd.read_parquet(files["sft.parquet"])
    assert set(sft.correct) == {True, False}
    assert {"data_source", "prompt", "ability", "reward_model", "extra_info"} <= set(sft.columns)

    benchmark = get_benchmark("make10")
    question = benchmark.read(files["test.jsonl"])[0]
    numbers = tuple(map(int, question.answer.split()))
    assert question.prompt == f"Make 10 from {question.answer}"
    for pattern, result in valid_patterns(numbers).items():
        request = benchmark.grade_request(question, f"\\boxed{{{expression(numbers, pattern)}}}")
        assert grade(request) == float(result == 10)
