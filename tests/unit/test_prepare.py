"""Downloads from a stand-in of the Hub, over HTTP, into this project's layouts."""

import base64
import gzip
import hashlib
import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xbai.benchmarks.registry import get_benchmark
from xbai.errors import UserError
from xbai.grading import GradeRequest, GraderPool, grade

SCRIPT = Path(__file__).parents[2] / "data" / "prepare.py"

MATH500 = [{"problem": "Half?", "solution": "...", "answer": "\\frac{1}{2}", "level": 1, "unique_id": "test/1"}]
DEEPSCALER = [{"problem": "x?", "answer": "-\\frac{2}{3}", "solution": "..."}, {"problem": "y?", "answer": ""}]
LIVECODEBENCH = {
    "question_content": "Print it.",
    "question_id": "a",
    "contest_date": "2023-08-03T00:00:00",
    "starter_code": "",
    "public_test_cases": '[{"input": "1", "output": "1"}]',
    "private_test_cases": "[]",
    "metadata": "{}",
}
_PRIVATE = pickle.dumps('[{"input": "3", "output": "6"}]')
LATER = {
    **LIVECODEBENCH,
    "question_content": "Print it doubled.",
    "question_id": "b",
    "contest_date": "2024-08-03T00:00:00",
    "public_test_cases": '[{"input": "2", "output": "4"}]',
    "private_test_cases": base64.b64encode(zlib.compress(_PRIVATE)).decode(),
}
GSM8K_CARD = b"""---
configs:
- config_name: main
  data_files:
  - split: test
    path: main/test-*
---
"""
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


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


class Hub(ThreadingHTTPServer):
    """As much of the Hub's interface as its own clients need to download datasets out of a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.folder = folder
        self.asked: list[str] = []
        self.break_off: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def publish(self, dataset: str, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            path = self.folder / dataset / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


class HubRequest(BaseHTTPRequestHandler):
    """`/api/datasets/OWNER/NAME/...` describes files, `/datasets/OWNER/NAME/resolve/REVISION/FILE` serves them."""

    protocol_version = "HTTP/1.1"
    revision = "0123456789abcdef0123456789abcdef01234567"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        folder = self._dataset()
        self._send_json([self._describe(folder, folder / path) for path in paths if (folder / path).exists()])

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        parts = self._parts()
        if len(parts) < 4:
            self._send(404, b"", {})
            return
        folder = self._dataset()
        if not folder.is_dir():
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif parts[0] == "datasets":
            self._send_file(folder / "/".join(parts[5:]))
        elif "tree" in parts:
            inside = folder / "/".join(parts[6:])
            recursive = "recursive=true" in self.path.lower()
            found = (inside.rglob("*") if recursive else inside.iterdir()) if inside.is_dir() else []
            self._send_json([self._describe(folder, path) for path in sorted(found)])
        else:
            siblings = [{"rfilename": str(path.relative_to(folder))} for path in folder.rglob("*") if path.is_file()]
            name = "/".join(folder.parts[-2:])
            self._send_json({"id": name, "sha": self.revision, "siblings": siblings, "tags": [], "private": False})

    def _parts(self) -> list[str]:
        return unquote(urlsplit(self.path).path).strip("/").split("/")

    def _dataset(self) -> Path:
        parts = self._parts()
        start = 1 if parts[0] == "datasets" else 2
        return self.server.folder / parts[start] / parts[start + 1]

    def _describe(self, folder: Path, path: Path) -> dict:
        kind, size = ("directory", 0) if path.is_dir() else ("file", path.stat().st_size)
        oid = hashlib.sha1(str(path).encode()).hexdigest()
        return {"type": kind, "path": str(path.relative_to(folder)), "size": size, "oid": oid}

    def _send_file(self, path: Path) -> None:
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.revision})
            return
        content = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self.revision}
        if first := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            rest = content[int(first[1]) :]
            span = f"bytes {first[1]}-{len(content) - 1}/{len(content)}"
            self._send(206, rest, {**headers, "Content-Range": span})
        elif self.command == "GET" and path.name == self.server.break_off:
            self.server.break_off = None
            self._send(200, content, headers, sent=len(content) // 2)
            self.close_connection = True
        else:
            self._send(200, content, headers)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str], sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:sent])


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    server = Hub(tmp_path_factory.mktemp("hub"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.publish("HuggingFaceH4/MATH-500", {"test.jsonl": lines(MATH500)})
    server.publish("openai/gsm8k", {"README.md": GSM8K_CARD, "main/test-00000-of-00001.parquet": parquet(GSM8K)})
    server.publish("agentica-org/DeepScaleR-Preview-Dataset", {"deepscaler.json": json.dumps(DEEPSCALER).encode()})
    server.publish("AI-MO/NuminaMath-1.5", {"data/train-00000-of-00001.parquet": parquet(NUMINA)})
    server.publish(
        "livecodebench/code_generation_lite",
        {"test.jsonl": lines([LIVECODEBENCH]), "test2.jsonl": lines([LATER]), "code_generation_lite.py": b"raise"},
    )
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory):
    """`run(*arguments) -> finished process` of the script, against the stand-in."""
    cache = tmp_path_factory.mktemp("cache")

    def run_script(*arguments, **environment):
        variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        variables |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **environment}
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=250)

    return run_script


@pytest.fixture(scope="module")
def prepared(run, tmp_path_factory):
    """A folder with one set of each kind."""
    folder = tmp_path_factory.mktemp("data")
    names = ("math500", "gsm8k", "deepscaler", "numina-math", "livecodebench")
    finished = run(*names, "--release", "release_v2", "--start_date", "2024-01-01", "--out", folder)
    assert finished.returncode == 0, finished.stderr
    assert [Path(line.split()[1]).name for line in finished.stdout.splitlines() if line.startswith("wrote")] == [
        *("math500.jsonl", "math500.parquet", "gsm8k.jsonl", "gsm8k.parquet"),
        *("deepscaler.parquet", "numina-math.parquet", "livecodebench.jsonl"),
    ]
    return folder


@pytest.mark.parametrize(
    "name,answer,right,wrong",
    [("math500", "\\frac{1}{2}", "\\boxed{0.5}", "\\boxed{2}"), ("gsm8k", "2,002", "\\boxed{2002}", "\\boxed{2}")],
)
def test_a_prepared_benchmark_is_read_asked_and_graded(prepared, name, answer, right, wrong):
    benchmark = get_benchmark(name)
    (question,) = benchmark.read(prepared / f"{name}.jsonl")
    assert question.answer == answer
    assert benchmark.messages(question) == [{"role": "user", "content": question.prompt}]
    assert question.prompt.count(benchmark.instruction) == 1
    assert grade(benchmark.grade_request(question, right)) == 1.0
    assert grade(benchmark.grade_request(question, wrong)) == 0.0


@pytest.mark.parametrize("name,right", [("math500", "\\boxed{0.5}"), ("gsm8k", "\\boxed{2002}")])
def test_a_prepared_benchmark_of_mathematics_is_validation_data_too(prepared, name, right):
    (row,) = pq.read_table(prepared / f"{name}.parquet").to_pylist()
    (question,) = get_benchmark(name).read(prepared / f"{name}.jsonl")
    assert row["prompt"] == get_benchmark(name).messages(question)
    request = GradeRequest(row["data_source"], right, row["reward_model"]["ground_truth"])
    assert grade(request) == 1.0
    assert get_benchmark(name).read(prepared / f"{name}.parquet")[0].answer == str(question.answer)


def test_prepared_programs_are_selected_read_and_graded(prepared):
    benchmark = get_benchmark("livecodebench", release="release_v2")
    (question,) = benchmark.read(prepared / "livecodebench.jsonl")
    assert question.meta == {"question_id": "b", "contest_date": "2024-08-03T00:00:00", "release": "release_v2"}
    assert benchmark.messages(question) == [{"role": "user", "content": question.prompt}]
    assert "Print it doubled." in question.prompt
    assert len(str(question.answer)) < 500
    assert grade(benchmark.grade_request(question, "```python\nprint(2 * int(input()))\n```")) == 1.0
    assert grade(benchmark.grade_request(question, "```python\nprint(4)\n```")) == 0.0


def test_tests_that_have_changed_are_not_used(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    benchmark = get_benchmark("livecodebench")
    (question,) = benchmark.read(tmp_path / "livecodebench.jsonl")
    for file in (tmp_path / "livecodebench.tests").iterdir():
        file.write_bytes(gzip.compress(b'{"tests": [{"input": "", "output": ""}]}'))
    with pytest.raises(ValueError, match="is not the file that was prepared"):
        grade(benchmark.grade_request(question, "```python\n```"))


def test_a_benchmark_without_its_tests_is_not_prepared(prepare, prepared, tmp_path):
    selection = {"release": "release_v2", "start_date": "2024-01-01"}
    assert prepare.is_prepared("livecodebench", prepared, selection)
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "livecodebench.tests").iterdir():
        file.unlink()
    assert not prepare.is_prepared("livecodebench", tmp_path, selection)


def test_training_sets_keep_only_rows_that_can_be_checked(prepared):
    (row,) = pq.read_table(prepared / "deepscaler.parquet").to_pylist()
    assert row["reward_model"] == {"style": "rule", "ground_truth": {"target": "-\\frac{2}{3}"}}
    rows = pq.read_table(prepared / "numina-math.parquet").to_pylist()
    assert [row["extra_info"] for row in rows] == [
        {"index": 0, "split": "train", "question": "1+1?"},
        {"index": 1, "split": "train", "question": "2+1?"},
    ]
    assert rows[1]["prompt"][0]["role"] == "user"
    assert rows[1]["prompt"][0]["content"].startswith("2+1? Let's think step by step")
    assert grade(GradeRequest(rows[1]["data_source"], "\\boxed{3}", rows[1]["reward_model"]["ground_truth"])) == 1.0


def test_sums_and_origins_are_recorded_for_every_file(prepared):
    sums = json.loads((prepared / "SHA256SUMS.json").read_text(encoding="utf-8"))
    assert set(sums) == {path.name for path in prepared.iterdir() if path.is_file()} - {"SHA256SUMS.json"}
    for name, entry in sums.items():
        assert entry["sha256"] == hashlib.sha256((prepared / name).read_bytes()).hexdigest()
        assert entry["revision"] == HubRequest.revision
    assert sums["numina-math.parquet"]["rows"] == 2
    assert (sums["livecodebench.jsonl"]["release"], sums["livecodebench.jsonl"]["start_date"]) == (
        "release_v2",
        "2024-01-01",
    )


def test_what_is_there_is_checked_and_made_again_from_the_same_revision(prepared, hub, run, tmp_path, monkeypatch):
    old_revision = HubRequest.revision
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    hub.asked.clear()
    again = run("gsm8k", "math500", "--out", tmp_path)
    assert again.stdout.splitlines() == [
        "gsm8k is there already, and its checksums are right",
        "math500 is there already, and its checksums are right",
    ]
    assert not hub.asked
    (tmp_path / "gsm8k.jsonl").write_text("{}", encoding="utf-8")
    (tmp_path / "math500.jsonl").unlink()
    (tmp_path / "deepscaler.parquet").touch()
    assert "gsm8k.jsonl has changed since it was prepared" in run("gsm8k", "--out", tmp_path).stderr
    monkeypatch.setattr(HubRequest, "revision", "f" * 40)
    assert "wrote" in run("math500", "--out", tmp_path).stdout
    assert (
        json.loads((tmp_path / "SHA256SUMS.json").read_text(encoding="utf-8"))["math500.jsonl"]["revision"]
        == old_revision
    )
    (tmp_path / "aime24.jsonl").write_text("my own", encoding="utf-8")
    assert "aime24.jsonl exists, and is not listed" in run("aime24", "--out", tmp_path).stderr
    assert (tmp_path / "aime24.jsonl").read_text(encoding="utf-8") == "my own"


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub, run, tmp_path):
    # The Hub's client keeps what has arrived by pieces of 10 MB.
    rows = [{**LIVECODEBENCH, "question_title": "x" * 3_000_000}] * 9
    hub.publish("livecodebench/code_generation_lite", {"test.jsonl": lines(rows)})
    hub.asked.clear()
    hub.break_off = "test.jsonl"
    arguments = ("livecodebench", "--release", "release_v1", "--out")
    cache = {"HF_HOME": str(tmp_path / "cache")}
    finished = run(*arguments, tmp_path / "first", **cache)
    assert finished.returncode == 0, finished.stderr
    assert len((tmp_path / "first/livecodebench.jsonl").read_text(encoding="utf-8").splitlines()) == len(rows)
    downloads = [each for each in hub.asked if each.startswith("GET /datasets/livecodebench")]
    assert len(downloads) == 2
    assert re.search(r"test\.jsonl bytes=\d{4,}-$", downloads[1])
    # What has arrived once is not downloaded again.
    hub.asked.clear()
    assert run(*arguments, tmp_path / "second", **cache).returncode == 0
    assert not [each for each in hub.asked if each.startswith("GET /datasets/livecodebench")]


def test_a_broken_file_leaves_nothing_behind(hub, run, tmp_path):
    hub.publish(
        "math-ai/aime25", {"test.jsonl": lines([{"problem": "a", "answer": "1"}, {"problem": "b", "answer": "x"}])}
    )
    finished = run("aime25", "--out", tmp_path)
    assert finished.returncode == 2
    assert "aime25: row 2: an AIME answer must be an integer" in finished.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments,environment,complaint",
    [
        (["aime24"], {"HF_HUB_OFFLINE": "1"}, "error: cannot download HuggingFaceH4/aime_2024: "),
        (["aime24"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "error: cannot download HuggingFaceH4/aime_2024: "),
        (["aime24"], {}, "error: cannot download HuggingFaceH4/aime_2024: "),
        (["sudoku"], {}, "error: unknown data set sudoku"),
        (["livecodebench", "--release", "v9"], {}, "error: release 'v9': known are release_v1"),
        (["make10", "--release", "release_v1"], {}, "error: --release, --start_date and --end_date select from"),
    ],
)
def test_one_line_errors(run, tmp_path, arguments, environment, complaint):
    result = run(*arguments, "--out", tmp_path, **environment)
    assert result.returncode == 2
    assert result.stderr.startswith(complaint)
    assert result.stderr.count("\n") == 1


def test_a_set_of_the_hub_names_the_extra_that_reads_it(prepare, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"^owner/name is read with the package datasets: pip install -e '\.\[data\]'$"):
        next(prepare.download(prepare.HubSource("owner/name", "test"), "main"))


def test_ceval_prompts_hold_subject_question_and_options(prepare):
    (row,) = prepare.benchmark_rows("ceval", CEVAL)
    assert row["prompt"].startswith("\n以下是中国关于计算机网络考试的单项选择题")
    options = "A. {等待冲突}\nB. {等待令牌}\nC. {监听介质}\nD. {接受一个帧}"
    assert f"\n{{在802.3标准中，发送帧之前需要____}}\n{options}\n让我们一步一步思考" in row["prompt"]
    assert (row["subject"], row["id"], row["answer"]) == ("computer_network", 3, "C")


def test_ceval_test_rows_are_asked_but_not_graded(prepare, tmp_path):
    prepare.write_jsonl(tmp_path / "test.jsonl", prepare.benchmark_rows("ceval", [{**CEVAL[0], "answer": ""}]))
    benchmark = get_benchmark("ceval")
    (question,) = benchmark.read(tmp_path / "test.jsonl")
    assert benchmark.messages(question)[0]["content"].startswith("\n以下是中国关于计算机网络考试")
    with GraderPool(1) as pool:
        assert pool.grade([benchmark.grade_request(question, "答案：C")]) == [None]
