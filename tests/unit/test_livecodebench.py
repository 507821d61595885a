"""LiveCodeBench: the published layout, releases and dates, prompts, and its tests."""

import base64
import gzip
import json
import os
import pickle
import zlib

import pytest
from typer.testing import CliRunner

from xbai.benchmarks.livecodebench import LiveCodeBench
from xbai.benchmarks.registry import get_benchmark
from xbai.cli import app
from xbai.errors import UserError
from xbai.grading import GradeRequest, grade
from xbai.grading.code_tests import Case, read_code_tests, unpack_cases

SUM_PROGRAM = "print(sum(map(int, input().split())))"


def packed(cases):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def published_row(number=1, **fields):
    return {
        "question_title": "A plus B",
        "question_content": "Print the sum.",
        "platform": "atcoder",
        "question_id": f"abc{number}_a",
        "contest_date": "2024-08-03T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps([{"input": "1 2", "output": "3", "testtype": "stdin"}]),
        "private_test_cases": packed([{"input": "2 2", "output": "4", "testtype": "stdin"}]),
        "metadata": "{}",
        **fields,
    }


LEETCODE = published_row(
    starter_code="class Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        ",
    public_test_cases=json.dumps([{"input": "1\n[2, 3]", "output": "6", "testtype": "functional"}]),
    private_test_cases=json.dumps([{"input": "0\n[]", "output": "0", "testtype": "functional"}]),
    metadata=json.dumps({"func_name": "add"}),
)


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows):
        path = tmp_path / "lcb.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write_rows


def fenced(code):
    return f"<think>hm</think>Here it is:\n```python\n{code}\n```\n"


def test_a_program_is_asked_for_and_runs_against_public_and_private_tests(write):
    benchmark = LiveCodeBench()
    (question,) = benchmark.read(write(published_row()))
    (message,) = benchmark.messages(question)
    assert "### Question:\nPrint the sum.\n\n### Format: Read the inputs from stdin" in message["content"]
    assert message["content"].endswith("### Answer: (use the provided format with backticks)\n\n")
    assert not {"public_test_cases", "private_test_cases", "metadata"} & set(question.meta)
    assert grade(benchmark.grade_request(question, fenced(SUM_PROGRAM))) == 1.0
    assert grade(benchmark.grade_request(question, fenced("print(3)"))) == 0.0
    assert grade(benchmark.grade_request(question, SUM_PROGRAM)) == 0.0


def test_a_function_is_asked_for_by_its_starter_code_and_called(write):
    benchmark = LiveCodeBench()
    (question,) = benchmark.read(write(LEETCODE))
    assert "starter code to write the solution" in benchmark.messages(question)[0]["content"]
    assert LEETCODE["starter_code"] in benchmark.messages(question)[0]["content"]
    right = LEETCODE["starter_code"] + "return a + sum(b)"
    assert grade(benchmark.grade_request(question, fenced(right))) == 1.0
    assert grade(benchmark.grade_request(question, fenced(right.replace("+", "-")))) == 0.0


def test_a_prompt_that_carries_its_format_is_left_alone(write):
    benchmark = LiveCodeBench()
    (question,) = benchmark.read(write(published_row()))
    prompt = benchmark.messages(question)[0]["content"]
    (again,) = benchmark.read(write({"prompt": prompt, "answer": question.answer}))
    assert benchmark.messages(again) == [{"role": "user", "content": prompt}]


@pytest.mark.parametrize(
    "selection,chosen",
    [
        ({}, [1, 2, 3]),
        ({"release": "release_v1"}, [1]),
        ({"release": "release_v5"}, [1, 2]),
        ({"start_date": "2024-08-01"}, [2, 3]),
        ({"start_date": "2024-08-01", "end_date": "2024-08-03"}, [2]),
        ({"release": "release_v5", "end_date": "2024-01-01"}, [1]),
    ],
)
def test_release_and_dates_select(write, selection, chosen):
    path = write(
        published_row(1, contest_date="2023-08-21T00:00:00", release="release_v1"),
        published_row(2, release="release_v5"),
        published_row(3, contest_date="2025-02-01T00:00:00", release="release_v6"),
    )
    questions = get_benchmark("livecodebench", **selection).read(path)
    assert [question.meta["question_id"] for question in questions] == [f"abc{number}_a" for number in chosen]
    assert [question.index + 1 for question in questions] == chosen


@pytest.mark.parametrize(
    "name,selection,complaint",
    [
        ("livecodebench", {"release": "v9"}, "release 'v9': known are release_v1"),
        ("livecodebench", {"start_date": "soon"}, "start_date must be a date such as 2024-08-01"),
        ("livecodebench", {"start_date": "2030-01-01"}, "none of its 1 questions is in the release and dates"),
        ("livecodebench", {"release": "release_v1"}, "item 1 names no release"),
        ("aime24", {"release": "release_v1"}, "release: aime24 has no such selection"),
    ],
)
def test_bad_selections(write, name, selection, complaint):
    with pytest.raises(UserError, match=complaint):
        get_benchmark(name, **selection).read(write(published_row()))


@pytest.mark.parametrize(
    "fields,complaint",
    [
        ({"metadata": "{"}, r"lcb\.jsonl:1: metadata is not valid JSON"),
        ({"public_test_cases": "{}"}, r"lcb\.jsonl:1: public_test_cases must be a JSON list"),
    ],
)
def test_bad_rows(write, fields, complaint):
    with pytest.raises(UserError, match=complaint):
        LiveCodeBench().read(write(published_row(**fields)))
    with pytest.raises(UserError, match="must hold tests"):
        LiveCodeBench().read(write({"prompt": "a", "answer": "{}"}))


PROGRAM_PROMPT = """\
You will be given a question (problem specification) and will generate a correct Python program that matches the \
specification and passes all tests.

### Question:
Print the sum.

### Format: Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the \
sample inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads \
the inputs, runs the algorithm and writes output to STDOUT.
```python
# YOUR CODE HERE
```

### Answer: (use the provided format with backticks)

"""


def test_the_published_prompt(write):
    (question,) = LiveCodeBench().read(write(published_row()))
    assert LiveCodeBench().messages(question) == [{"role": "user", "content": PROGRAM_PROMPT}]


def test_results_are_graded_where_the_tests_are(write, tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    with gzip.open(tmp_path / "tests" / "1.json.gz", "wt") as stream:
        json.dump({"tests": [{"input": "1 2", "output": "3"}]}, stream)
    answer = json.dumps({"file": "tests/1.json.gz"})
    (question,) = LiveCodeBench().read(write({"prompt": "Print the sum.", "answer": answer}))
    assert question.answer == answer
    monkeypatch.setenv("XBAI_DATA", str(tmp_path))
    assert grade(LiveCodeBench().grade_request(question, fenced(SUM_PROGRAM))) == 1.0
    monkeypatch.setenv("XBAI_DATA", str(tmp_path / "tests"))
    with pytest.raises(UserError, match=r"tests/tests/1\.json\.gz: no such file of tests.*XBAI_DATA"):
        LiveCodeBench().grade_request(question, fenced(SUM_PROGRAM))


def test_questions_whose_tests_are_missing(write):
    with pytest.raises(UserError, match=r"lcb-tests/1\.json\.gz.*no such file of tests"):
        LiveCodeBench().read(write({"prompt": "a", "answer": json.dumps({"file": "lcb-tests/1.json.gz"})}))


def test_tests_in_a_file_beside_the_questions(write, tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    with gzip.open(tmp_path / "tests" / "1.json.gz", "wt") as stream:
        json.dump({"tests": [{"input": "1 2", "output": "3"}]}, stream)
    path = write({"prompt": "Print the sum.", "answer": json.dumps({"file": "tests/1.json.gz"})})
    benchmark = LiveCodeBench()
    (question,) = benchmark.read(path)
    monkeypatch.chdir("/")
    assert grade(benchmark.grade_request(question, fenced(SUM_PROGRAM))) == 1.0


def test_packed_tests():
    cases = [{"input": "é\n", "output": "1"}]
    assert unpack_cases(packed(cases)) == unpack_cases(json.dumps(cases)) == cases
    tests = read_code_tests(json.dumps({"function": "f", "tests": cases, "private_test_cases": packed(cases)}))
    assert tests.function == "f"
    assert tests.cases == (Case("é\n", "1"),) * 2
    assert read_code_tests(tests.to_json()) == tests


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize(
    "text,complaint",
    [
        (base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode(), "posix.mkdir"),
        (base64.b64encode(zlib.compress(pickle.dumps([1]))).decode(), "hold a list"),
        (base64.b64encode(zlib.compress(b"no pickle")).decode(), "packed test cases"),
        (base64.b64encode(zlib.compress(pickle.dumps("[]"))[:-9]).decode(), "cut off"),
        (base64.b64encode(b"not zlib").decode(), "packed test cases"),
        ("%%%", "packed test cases"),
        ("{}", "must be a list"),
    ],
)
def test_hostile_packed_tests_load_nothing(text, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        unpack_cases(text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tests", ["[]", "{}", '{"tests": []}', '{"tests": [{"input": "1"}]}', "no"])
def test_no_tests_are_no_grade(tests):
    with pytest.raises(ValueError):
        grade(GradeRequest("livecodebench", fenced("pass"), tests))


def test_the_driver_takes_releases_and_dates_to_the_benchmark(write):
    path = write(published_row())
    arguments = [
        "--input_file",
        str(path),
        "--output_file",
        "out",
        "--model_dir",
        "none",
        "--response_api_url",
        "http://x",
    ]
    for task, options, complaint in [
        ("aime24", ["--release", "release_v1", "--end_date", "2024-01-01"], "end_date, release: aime24 has no such"),
        ("livecodebench", ["--start_date", "soon"], "start_date must be a date"),
    ]:
        result = CliRunner().invoke(app, ["infer", "--task", task, *arguments, *options])
        assert (result.exit_code, complaint in result.output) == (2, True)
