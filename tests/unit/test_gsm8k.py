"""GSM8K's published files as training files."""

import json
from pathlib import Path

import pandas as pd
import pytest

from xbai.benchmarks.gsm8k import find_file, read_problems, solution_steps, write_splits
from xbai.benchmarks.registry import get_benchmark
from xbai.errors import UserError
from xbai.grading import grade

SOLUTION = "He has 3+4=<<3+4=7>>7 apples.\n\nThen he has 7*200=$<<7*200=1400>>1,400\n#### 1,400"


def row(number: int) -> dict[str, str]:
    return {
        "question": f"Tom has {number} apples. How many?",
        "answer": f"It is {number}*1=<<{number}*1={number}>>{number}.\n#### {number}",
    }


@pytest.fixture
def published(tmp_path: Path) -> Path:
    folder = tmp_path / "published"
    folder.mkdir()
    with (folder / "train.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row(number)) + "\n" for number in range(40))
    pd.DataFrame([row(number) for number in range(50, 55)]).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def test_steps_are_the_lines_of_the_solution_without_the_calculator():
    assert solution_steps(SOLUTION) == ["He has 3+4=7 apples", "Then he has 7*200=$1,400"]
    assert solution_steps("no answer") == []


def test_parts_are_disjoint_and_ask_as_the_benchmark_does(published: Path, tmp_path: Path):
    sft, train, validation, test, *to_sample = write_splits(published, tmp_path / "out").values()
    rows = [pd.read_parquet(path) for path in (sft, train, validation)]
    questions = [prompt[0]["content"] for frame in rows for prompt in frame.prompt]
    assert [len(frame) for frame in rows] == [18, 18, 4]
    assert len(set(questions)) == 40
    benchmark = get_benchmark("gsm8k")
    published_questions = benchmark.read(published / "train.jsonl")
    assert set(questions) == {benchmark.messages(question)[0]["content"] for question in published_questions}
    for _, learnt in rows[0].iterrows():
        question = next(q for q in published_questions if q.answer == learnt.reward_model["ground_truth"])
        assert grade(benchmark.grade_request(question, learnt.response)) == 1.0
    assert [question.answer for question in benchmark.read(test)] == [str(number) for number in range(50, 55)]
    assert "<<" not in "".join(rows[0].response)
    for path, frame in zip(to_sample, (rows[2], rows[1])):
        asked = [benchmark.messages(question)[0]["content"] for question in benchmark.read(path)]
        assert asked == [prompt[0]["content"] for prompt in frame.prompt]


def test_the_seed_decides_which_problem_goes_where(published: Path, tmp_path: Path):
    first, again, other = (
        pd.read_parquet(write_splits(published, tmp_path / name, seed)["sft.parquet"]).response.tolist()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again != other


def test_what_is_no_gsm8k_is_one_line(published: Path, tmp_path: Path):
    (published / "train.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match=r"needs one file train\*.* found train.json, train.jsonl"):
        find_file(published, "train")
    with pytest.raises(UserError, match="found none"):
        find_file(tmp_path, "train")
    (tmp_path / "train.jsonl").write_text('{"question": "How many?", "answer": "7"}\n', encoding="utf-8")
    with pytest.raises(
        UserError, match=r"train.jsonl:1: 'answer' must be a worked solution that ends in '#### NUMBER'"
    ):
        read_problems(tmp_path / "train.jsonl")
