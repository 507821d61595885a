"""The driver against both real services: killed, resumed, with a dead copy among them, and measured."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from xbai.calibration import Calibration, CombinedScore, ScoreChance
from xbai.model_identity import model_identity

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
QUESTIONS, CANDIDATES = 6, 8


@pytest.fixture(scope="module")
def services(start_service: Callable, tiny_model_dir: Path) -> dict[str, str]:
    policy = start_service("policy_model_queue.py", "--model_path", str(tiny_model_dir), "--engine", "hf")
    scorer = start_service("score_model_queue.py", "--model_path", str(tiny_model_dir))
    return {"policy": policy.wait_ready().url, "score": scorer.wait_ready().url}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "make10.jsonl"
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(QUESTIONS):
            numbers = " ".join(str(rng.randint(1, 9)) for _ in range(5))
            stream.write(json.dumps({"prompt": f"Make 10 from {numbers}", "answer": numbers}) + "\n")
    return path


def script(name: str, **options: object) -> list[str]:
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return [sys.executable, str(REPOSITORY / "test" / name), *flags]


@pytest.fixture
def command(
    services: dict[str, str], questions: Path, tiny_model_dir: Path, tmp_path: Path
) -> Callable[..., list[str]]:
    """The command of the README, with changes."""

    def build(**changes: object) -> list[str]:
        options = {
            "task": "make10",
            "input_file": questions,
            "output_file": tmp_path / "out.jsonl",
            "n_samples": CANDIDATES // 2,
            "branch": 2,
            "model_dir": tiny_model_dir,
            "score_api_url": f"{services['score']}/score",
            "response_api_url": f"{services['policy']}/score",
            "max_tokens": 24,
            "response_num": 2,
            **changes,
        }
        return script("inference.py", **{key: value for key, value in options.items() if value is not None})

    return build


def run(command: list[str], status: int = 0) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def results(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_complete(lines: list[dict], candidates: int = CANDIDATES) -> None:
    assert [line["index"] for line in lines] == list(range(QUESTIONS))
    for line in lines:
        output = line["output"]
        assert output["sample_lst"] == list(range(candidates))
        assert len(output["solution_lst"]) == candidates
        assert all(solution.startswith(line["prompt"]) for solution in output["solution_lst"])
        assert all(0 <= score <= 1 for score in output["score_lst"])


def assert_steps_are_recorded(output: dict) -> None:
    names = ("step_score", "step_end", "step_log_prob", "token_count", "mean_log_prob")
    for scores, ends, log_probs, count, mean in zip(*(output[f"{name}_lst"] for name in names), strict=True):
        assert len(scores) == len(ends) == len(log_probs) - 1
        assert sum(log_probs) / count == pytest.approx(mean, abs=1e-4)
        assert log_probs == [round(log_prob, 4) for log_prob in log_probs]


def test_killed_and_resumed_gives_what_an_undisturbed_run_gives(command: Callable, tmp_path: Path) -> None:
    run(command(output_file=tmp_path / "whole.jsonl"))
    whole = results(tmp_path / "whole.jsonl")
    assert_complete(whole)

    killed = command(output_file=tmp_path / "killed.jsonl", max_in_flight=1)
    journal = tmp_path / "killed.jsonl.journal"
    for wanted in (5, 15):
        process = subprocess.Popen(killed, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"response") < wanted):
            time.sleep(0.005)
        process.kill()
        process.wait()
        if journal.exists():
            with journal.open("ab") as stream:
                stream.write(b'{"question": 0, "sample": 3, "resp')
    assert journal.exists(), "the run was not interrupted"
    kept = journal.read_bytes().count(b'"finish_reason"')
    assert 0 < kept < QUESTIONS * CANDIDATES
    assert f"{kept} of {QUESTIONS * CANDIDATES} samples are there already" in run(killed)
    resumed = results(tmp_path / "killed.jsonl")
    assert_complete(resumed)
    for line, expected in zip(resumed, whole):
        assert line["output"]["solution_lst"] == expected["output"]["solution_lst"]
        assert line["output"]["score_lst"] == pytest.approx(expected["output"]["score_lst"], abs=1e-5)


def test_a_finished_run_asks_for_nothing_and_grows(command: Callable, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run(command())
    before = results(path)
    run(command())
    assert results(path) == before
    run(command(branch=3))
    assert_complete(results(path), CANDIDATES // 2 * 3)
    assert results(path)[0]["output"]["solution_lst"][:CANDIDATES] == before[0]["output"]["solution_lst"]
    assert "temperature=0.6, now 0.5" in run(command(temperature=0.5), status=2)


def test_a_run_with_a_budget_goes_on_and_is_measured(command: Callable, tiny_model_dir: Path, tmp_path: Path) -> None:
    def budgeted(**changes: object) -> list[str]:
        options = {
            "n_samples": 2,
            "branch": 4,
            "score_api_url": None,
            "max_tokens": 24,
            "model_dir": tmp_path / "model",
        }
        return command(**options, budget="posterior:0.6/3", **changes)

    shutil.copytree(tiny_model_dir, tmp_path / "model")
    settings = {"identity": model_identity(tiny_model_dir), "temperature": 0.6, "questions": "others"}
    combined = CombinedScore(1.0, 1.0, 1.0, 1.0)
    Calibration(**settings, combined=combined, chance=ScoreChance(1.0, 0.0)).write(tmp_path / "model")
    run(budgeted(output_file=tmp_path / "whole.jsonl"))
    run(budgeted(max_questions=2))
    assert "differ" not in run(budgeted())
    whole, resumed = results(tmp_path / "whole.jsonl"), results(tmp_path / "out.jsonl")
    for ours, theirs in zip(whole, resumed, strict=True):
        for name in ("solution_lst", "finish_reason_lst", "sample_lst", "content"):
            assert ours["output"][name] == theirs["output"][name]
        assert ours["output"]["score_lst"] == pytest.approx(theirs["output"]["score_lst"], abs=1e-5)
        assert ours["settings"] == theirs["settings"]
    reasons = [line["output"]["finish_reason_lst"] for line in whole]
    # A random model writes no answer, so that a group never has enough before its last wave.
    assert all(len(each) == 2 * 4 and set(each) <= {"stop", "length"} for each in reasons)
    report = tmp_path / "report.json"
    measure = {"task": "make10", "result_paths": tmp_path / "out.jsonl", "N": 4}
    run(script("compute_metric.py", **measure, json=report))
    tokens = sum(sum(line["output"]["token_count_lst"]) for line in whole) / QUESTIONS / 2
    measured = json.loads(report.read_text(encoding="utf-8"))
    assert (measured["tokens"]["mean"], measured["begun"]["mean"], measured["accuracy"]["mean"]) == (tokens, 4, 0)


def test_fused_scores_equal_the_service_and_a_dead_copy_does_no_harm(
    command: Callable, services: dict[str, str], tmp_path: Path
) -> None:
    run(command(output_file=tmp_path / "service.jsonl", score_source="service"))
    urls = f"http://127.0.0.1:9/score,{services['policy']}"
    run(command(output_file=tmp_path / "fused.jsonl", score_api_url=None, response_api_url=urls))
    fused, served = results(tmp_path / "fused.jsonl"), results(tmp_path / "service.jsonl")
    assert_complete(fused)
    for ours, theirs in zip(fused, served):
        assert_steps_are_recorded(ours["output"])
        assert theirs["output"]["step_end_lst"] == theirs["output"]["step_log_prob_lst"] == [None] * CANDIDATES
        for solution, score, other, expected in zip(
            *(line["output"][name] for line in (ours, theirs) for name in ("solution_lst", "score_lst"))
        ):
            assert solution == other
            if "\ufffd" not in solution:
                assert score == pytest.approx(expected, abs=1e-4)


def test_ctrl_c_ends_cleanly_and_a_second_one_at_once(command: Callable, tmp_path: Path) -> None:
    interrupted = command(max_tokens=200, response_num=1, max_in_flight=1)
    journal = tmp_path / "out.jsonl.journal"
    for signals in (1, 2):
        before = journal.stat().st_size if journal.exists() else 0
        process = subprocess.Popen(interrupted, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not (journal.exists() and journal.stat().st_size > before + 500):
            time.sleep(0.01)
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 130, said
        assert "Traceback" not in said
        if signals == 1:
            kept = journal.read_bytes().count(b'"finish_reason"')
            assert f"interrupted: {kept} samples are kept; run the same command again to go on" in said


def test_parts_add_up(command: Callable, tmp_path: Path) -> None:
    for part in range(2):
        run(command(total_parts=2, part=part))
    assert sorted(line["index"] for line in results(tmp_path / "out.jsonl")) == list(range(QUESTIONS))


def test_metrics_of_a_run(command: Callable, tmp_path: Path) -> None:
    run(command(effort="low", branch=None))
    metric = script(
        "compute_metric.py", task="make10", result_paths=tmp_path / "o*.jsonl", N=2, json=tmp_path / "m.json"
    )
    text = run(metric)
    assert f"Test {CANDIDATES // 2} times" in text
    report = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    assert (report["questions"], report["samples"], report["ungraded"]) == (QUESTIONS, CANDIDATES, 0)
    assert report["curves"]["oracle"]["8"]["mean"] >= report["curves"]["best_of_n"]["8"]["mean"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "chess"}, "unknown benchmark 'chess'"),
        ({"input_file": "/nowhere.jsonl"}, "/nowhere.jsonl: no such file"),
        ({"model_dir": "/nowhere"}, "/nowhere"),
        ({"response_api_url": "ftp://x"}, "is not a service URL"),
        ({"response_api_url": "http://127.0.0.1:9", "patience": 0.1}, "start it first"),
        ({"score_api_url": None, "score_source": "service"}, "needs --score_api_url"),
        ({"effort": "high"}, "--effort high means --branch 32, not 2"),
        ({"total_parts": 2, "part": 2}, "must be from 0 to 1"),
    ],
)
def test_bad_input_is_one_line(command: Callable, changes: dict, message: str) -> None:
    text = run(command(**changes), status=2)
    assert [line for line in text.splitlines() if line.startswith("error: ") and message in line], text
    assert "Traceback" not in text


def test_a_prompt_that_the_template_refuses_is_one_line(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (model / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}?",
        encoding="utf-8",
    )
    user = {"role": "user", "content": "Make 10 from 1 2 3 4"}
    prompts = [[user], [{"role": "system", "content": "Be brief."}, user]]
    lines = [json.dumps({"prompt": prompt, "answer": "1 2 3 4"}) for prompt in prompts]
    (tmp_path / "questions.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    options = {"input_file": tmp_path / "questions.jsonl", "output_file": tmp_path / "out.jsonl", "model_dir": model}
    service = {"response_api_url": "http://127.0.0.1:1/generate", "n_samples": 1, "branch": 1}
    text = run(script("inference.py", task="make10", **options, **service), status=2)
    said = "questions.jsonl:3: the chat template refuses it: System role not supported"
    assert [line for line in text.splitlines() if line.startswith("error: ") and line.endswith(said)], text
    assert "Traceback" not in text
