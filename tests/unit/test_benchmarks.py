import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xbai.benchmarks import base
from xbai.benchmarks.registry import BENCHMARKS, get_benchmark
from xbai.benchmarks.rows import write_parquet
from xbai.errors import UserError
from xbai.grading import grade

SHARED_DATA = Path(os.environ.get("XBAI_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


def shared_file(name):
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not in {SHARED_DATA} (set XBAI_SHARED_DATA to its folder)")
    return path


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_registered_benchmark_exists(name):
    assert get_benchmark(name).name == name


def test_an_unknown_benchmark_names_the_known_ones():
    with pytest.raises(UserError, match=r"'aime23'.*aime24.*make10"):
        get_benchmark("aime23")


@pytest.mark.parametrize(
    "name,file,questions",
    [("aime24", "aime24.jsonl", 30), ("aime25", "aime25.jsonl", 30), ("aime24", "aime.parquet", 30)],
)
def test_aime_files(name, file, questions):
    benchmark = get_benchmark(name)
    read = benchmark.read(shared_file(file))
    assert [question.index for question in read] == list(range(questions))
    for question in read:
        (message,) = benchmark.messages(question)
        assert message["content"] == question.prompt
        assert message["content"].count("\\boxed") == 1
        assert grade(benchmark.grade_request(question, f"<think>hm</think>\\boxed{{{question.answer:03}}}")) == 1.0
        assert grade(benchmark.grade_request(question, f"\\boxed{{{question.answer + 1}}}")) == 0.0


def test_ceval_file():
    benchmark = get_benchmark("ceval")
    read = benchmark.read(shared_file("ceval.json"))
    assert len(read) == 1346
    for question in read:
        assert benchmark.messages(question) == [{"role": "user", "content": question.prompt}]
        assert grade(benchmark.grade_request(question, f"ANSWER: {question.answer}")) == 1.0
    assert read[0].meta == {"sub": "computer_network", "id": 0}


def test_ceval_prompts_made_here_are_the_published_ones():
    published = re.compile(
        r"\n以下是中国关于(.*?)考试的.*?\n\{(?P<question>.*)\}\n"
        r"A\. \{(?P<A>.*)\}\nB\. \{(?P<B>.*)\}\nC\. \{(?P<C>.*)\}\nD\. \{(?P<D>.*)\}\n让我们.*",
        re.DOTALL,
    )
    benchmark = get_benchmark("ceval")
    for question in benchmark.read(shared_file("ceval.json")):
        row = {
            "subject": question.meta["sub"],
            "answer": question.answer,
            **published.fullmatch(question.prompt).groupdict(),
        }
        (message,) = benchmark.messages(benchmark.question_from_row(0, row, "here"))
        assert message["content"] == question.prompt


def test_an_aime_answer_in_degrees():
    for answer in ("336^\\circ", "336^{\\circ}", "336°", 336):
        assert get_benchmark("aime25").question_from_row(0, {"problem": "a", "answer": answer}, "here").answer == 336


ROW_LAYOUTS = [
    {"prompt": "1+1?", "answer": 2},
    {"problem": "1+1?", "answer": "2"},
    {"question": "1+1?", "expected_answer": "2"},
    {"model_input": "1+1?", "ground_truth": "2"},
    {"prompt": "1+1?", "reward_model": {"style": "rule", "ground_truth": "2"}},
    {"prompt": "1+1?", "reward_model": {"style": "rule", "ground_truth": {"target": "2"}}},
    {"prompt": [{"role": "user", "content": "1+1?"}], "answer": "2"},
]


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("row", ROW_LAYOUTS, ids=lambda row: "-".join(row))
def test_layouts_in_circulation(tmp_path, suffix, row):
    (question,) = get_benchmark("math500").read(write(tmp_path / f"questions{suffix}", [row]))
    assert question.prompt == "1+1?"
    assert str(question.answer) == "2"


def test_json_lines_under_the_name_json(tmp_path):
    path = tmp_path / "questions.json"
    path.write_text('{"prompt": "a", "answer": 1}\n\n{"prompt": "b", "answer": 2}\n', encoding="utf-8")
    assert [question.prompt for question in get_benchmark("math500").read(path)] == ["a", "b"]


def test_the_instruction_is_added_once():
    benchmark = get_benchmark("math500")
    bare = benchmark.question_from_row(0, {"problem": "1+1?", "answer": "2"}, "here")
    (message,) = benchmark.messages(bare)
    assert message["content"] == "1+1?\nPlease reason step by step, and put your final answer within \\boxed{}."
    asked = benchmark.question_from_row(0, {"problem": message["content"], "answer": "2"}, "here")
    assert benchmark.messages(asked) == [message]


def test_a_whole_chat_is_kept_as_it_is():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    benchmark = get_benchmark("math500")
    question = benchmark.question_from_row(0, {"prompt": chat, "answer": "2"}, "here")
    assert question.prompt == "1+1?"
    assert benchmark.messages(question) == chat


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_chat_is_read_without_the_null_fields_that_parquet_adds(tmp_path, suffix):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    chat = [{"role": "user", "content": "1+1?"}, call, {"role": "tool", "content": "2", "name": "add"}]
    (question,) = get_benchmark("math500").read(
        write(tmp_path / f"q{suffix}", [{"prompt": chat, "answer": "2", "n": None}])
    )
    assert question.prompt == "1+1?"
    assert get_benchmark("math500").messages(question) == chat
    assert (
        question.place == f"{tmp_path}/q{suffix}" + {".jsonl": ":1", ".json": ": item 1", ".parquet": ": row 1"}[suffix]
    )


@pytest.mark.parametrize(
    "name,text,complaint",
    [
        ("math500", '{"prompt": "a", "answer": 1}\n{"answer": 1}\n', r"q\.jsonl:2: has none of the fields prompt, "),
        ("math500", '{"prompt": "a"}\n', r"q\.jsonl:1: has none of the fields answer, "),
        ("math500", '{"prompt": "a", "answer": " "}\n', r"q\.jsonl:1: 'answer' must be a string or a number"),
        ("math500", '{"prompt": "a", "answer": [1]}\n', r"q\.jsonl:1: 'answer' must be a string or a number"),
        ("math500", '{"prompt": 5, "answer": 1}\n', r"q\.jsonl:1: 'prompt' must be a text or a list"),
        ("math500", '{"prompt": [], "answer": 1}\n', r"q\.jsonl:1: 'prompt' must be a non-empty list"),
        (
            "math500",
            '{"prompt": [{"role": "system", "content": "a"}], "answer": 1}\n',
            r"q\.jsonl:1: 'prompt' must hold a message by the user",
        ),
        (
            "math500",
            '\n{"prompt": [{"role": "user", "content": 5}], "answer": 1}\n',
            r"q\.jsonl:2: 'prompt': message 1: content must be a text",
        ),
        ("math500", "\n[1]\n", r"q\.jsonl:2: expected an object"),
        ("math500", '{"prompt": \n', r"q\.jsonl:1: not valid JSON"),
        ("math500", '{"prompt": "a\\ud800", "answer": 1}\n', r"q\.jsonl:1: not valid JSON .*surrogates not allowed"),
        ("math500", "", r"q\.jsonl: holds no questions"),
        ("aime24", '{"prompt": "a", "answer": "1/2"}\n', r"q\.jsonl:1: an AIME answer must be an integer"),
        ("ceval", '{"prompt": "a", "answer": "E"}\n', r"q\.jsonl:1: the answer must be one of A, B, C, D"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, name, text, complaint):
    path = tmp_path / "q.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=complaint) as caught:
        get_benchmark(name).read(path)
    assert "\n" not in str(caught.value)


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"prompt": "a\\ud83d\\ude00", "answer": 1}\n', encoding="utf-8")
    assert get_benchmark("math500").read(tmp_path / "q.jsonl")[0].prompt == "a😀"


def test_bad_files(tmp_path):
    benchmark = get_benchmark("math500")
    with pytest.raises(UserError, match="no such file"):
        benchmark.read(tmp_path / "q.jsonl")
    (tmp_path / "q.csv").write_text("a,b", encoding="utf-8")
    with pytest.raises(UserError, match=r"unknown kind of file; use one of \.jsonl, \.json, \.parquet"):
        benchmark.read(tmp_path / "q.csv")
    (tmp_path / "q.jsonl").write_bytes('{"prompt": "é", "answer": 1}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"q\.jsonl: not a text in UTF-8"):
        benchmark.read(tmp_path / "q.jsonl")


def test_a_damaged_parquet_file_is_named(tmp_path, damage):
    path = tmp_path / "q.parquet"
    write_parquet(path, [{"prompt": f"What is {number} + 1?", "answer": number + 1} for number in range(100)])
    damage(path)
    with pytest.raises(UserError, match=rf"^{path}: cut off, or not a parquet file \(") as refused:
        get_benchmark("math500").read(path)
    assert "\n" not in str(refused.value)


def test_a_file_without_an_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "MAX_LINE_CHARACTERS", 1000)
    monkeypatch.setattr(base, "MAX_LIST_BYTES", 2000)
    monkeypatch.setattr(base, "PROBE_CHARACTERS", 16)
    row = json.dumps({"prompt": "é" * 100, "answer": 1}, ensure_ascii=False)
    files = {
        "endless.jsonl": f"{row}\n\n" + "x" * 5000,
        "endless.json": f"\n{row}\n" + "x" * 5000,
        "list.json": " " * 100 + "[" + ",".join([row] * 30) + "]",
    }
    endless = ":3: over 1000 characters"
    errors = {"endless.jsonl": endless, "endless.json": endless, "list.json": ": a list of"}
    for name, text in files.items():
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=f"{name}{errors[name]}"):
            list(base.read_rows(path))
    (tmp_path / "short.json").write_text(" " * 100 + f"[{row}]", encoding="utf-8")
    assert [place for _, place in base.read_rows(tmp_path / "short.json")] == [f"{tmp_path}/short.json: item 1"]
    (tmp_path / "short.jsonl").write_text(f"{row}\n\n{row}", encoding="utf-8")
    assert [place[-2:] for _, place in base.read_rows(tmp_path / "short.jsonl")] == [":1", ":3"]
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "zero.jsonl"):
        with pytest.raises(UserError, match=f"{name}: no such file"):
            list(base.read_rows(tmp_path / name))
