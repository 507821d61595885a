"""Conversion of Hub rows into this project's layouts, on rows written here."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from xbai.benchmarks.registry import get_benchmark
from xbai.errors import UserError
from xbai.grading import GradeRequest, grade

SCRIPT = Path(__file__).parents[2] / "data" / "prepare.py"

AIME = [{"id": 60, "problem": "What is $8+8$?", "solution": "...", "answer": "016", "url": "u", "year": "2024"}]
GSM8K = [{"question": "Two and two thousand?", "answer": "2+2000=<<2+2000=2002>>2002\n#### 2,002"}]
CEVAL = [
    {
        "subject": "computer_network",
        "id": 3,
        "question": "在802.3标准中，发送帧之前需要____",
        "A": "等待冲突",
        "B": "等待令牌",
        "C": "监听介质",
        "D": "接受一个帧",
        "answer": "C",
        "explanation": "",
    }
]
NUMINA = [
    {"problem": "1+1?", "answer": "2", "question_type": "math-word-problem", "problem_is_valid": "Yes"},
    {"problem": "Show it.", "answer": "proof", "question_type": "proof"},
    {"problem": "Which?", "answer": "A", "question_type": "MCQ"},
    {"problem": "Bad", "answer": "1", "question_type": "math-word-problem", "problem_is_valid": "No"},
    {"problem": "Nothing", "answer": None, "question_type": "math-word-problem"},
    {"problem": " 2+1? ", "answer": " 3 ", "question_type": "math-word-problem", "solution_is_valid": "Yes"},
]


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize(
    "name,rows,answer,response",
    [
        ("aime24", AIME, 16, "\\boxed{16}"),
        ("gsm8k", GSM8K, "2,002", "\\boxed{2002}"),
        ("ceval", CEVAL, "C", "答案：C"),
    ],
)
def test_a_prepared_benchmark_is_read_asked_and_graded(prepare, tmp_path, name, rows, answer, response):
    (path,) = prepare.prepare(name, tmp_path, lambda source: rows)
    benchmark = get_benchmark(name)
    (question,) = benchmark.read(path)
    assert question.answer == answer
    assert benchmark.messages(question) == [{"role": "user", "content": question.prompt}]
    assert question.prompt.count(benchmark.instruction) == 1
    assert grade(benchmark.grade_request(question, response)) == 1.0


def test_ceval_prompt_holds_subject_question_and_options(prepare):
    (row,) = prepare.benchmark_rows("ceval", CEVAL)
    assert row["prompt"].startswith("以下是中国关于计算机网络考试的单项选择题")
    assert (
        "\n在802.3标准中，发送帧之前需要____\nA. 等待冲突\nB. 等待令牌\nC. 监听介质\nD. 接受一个帧\n" in row["prompt"]
    )
    assert (row["subject"], row["id"]) == ("computer_network", 3)


def test_training_set_keeps_only_rows_that_can_be_checked(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "ROWS_AT_ONCE", 1)
    (path,) = prepare.prepare("numina-math", tmp_path, lambda source: NUMINA)
    rows = pq.read_table(path).to_pylist()
    assert [row["extra_info"] for row in rows] == [
        {"index": 0, "split": "train", "question": "1+1?"},
        {"index": 1, "split": "train", "question": "2+1?"},
    ]
    assert rows[1]["prompt"] == [{"role": "user", "content": f"2+1? {prepare.TRAINING_INSTRUCTION}"}]
    assert rows[1]["reward_model"] == {"style": "rule", "ground_truth": {"target": "3"}}
    assert grade(GradeRequest(rows[1]["data_source"], "\\boxed{3}", rows[1]["reward_model"]["ground_truth"])) == 1.0


def test_sums_are_recorded_for_every_file(prepare, tmp_path):
    prepare.prepare("aime24", tmp_path, lambda source: AIME)
    prepare.prepare("gsm8k", tmp_path, lambda source: GSM8K)
    sums = json.loads((tmp_path / "SHA256SUMS.json").read_text())
    assert set(sums) == {"aime24.jsonl", "gsm8k.jsonl"}
    for name, entry in sums.items():
        assert entry["sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert entry["rows"] == 1


def test_a_download_that_breaks_off_leaves_nothing(prepare, tmp_path):
    def broken(source):
        yield AIME[0]
        raise UserError("gone")

    with pytest.raises(UserError):
        prepare.prepare("aime24", tmp_path, broken)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments,complaint",
    [(["aime24"], "error: cannot download HuggingFaceH4/aime_2024"), (["sudoku"], "error: unknown data set sudoku")],
)
def test_one_line_errors(tmp_path, arguments, complaint):
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, "--out", str(tmp_path)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith(complaint)
    assert result.stderr.count("\n") == 1
