"""The searches by the command line, against real services: both where scores come from, and what may not be mixed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).parents[2]
QUESTIONS, BUDGET = 3, 160


@pytest.fixture(scope="module")
def services(start_service: Callable, tiny_model_dir: Path) -> dict[str, str]:
    policy = start_service("policy_model_queue.py", "--model_path", str(tiny_model_dir), "--engine", "hf")
    scorer = start_service("score_model_queue.py", "--model_path", str(tiny_model_dir))
    return {"policy": policy.wait_ready().url, "score": scorer.wait_ready().url}


@pytest.fixture
def infer(services: dict[str, str], tiny_model_dir: Path, tmp_path: Path) -> Callable[..., tuple[list[dict], str]]:
    """`infer(status=0, **flags)`: the result lines and what was said."""
    questions = tmp_path / "make10.jsonl"
    numbers = ["6 2 1 4 1", "8 8 1 3 2", "2 3 2 3 4"]
    questions.write_text(
        "".join(json.dumps({"prompt": f"Make 10 from {n}", "answer": n}) + "\n" for n in numbers), encoding="utf-8"
    )

    def run(status: int = 0, **flags: object) -> tuple[list[dict], str]:
        output = tmp_path / str(flags.pop("output_file", "out.jsonl"))
        options = {
            "task": "make10",
            "input_file": questions,
            "output_file": output,
            "model_dir": tiny_model_dir,
            "response_api_url": services["policy"],
            "temperature": 1.0,
            "top_p": 1.0,
            "max_tokens": 40,
            **flags,
        }
        said = script("inference.py", status, **options)
        lines = (
            [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()] if output.exists() else []
        )
        return lines, said

    return run


def script(name: str, status: int = 0, **options: object) -> str:
    flags = [text for key, value in options.items() if value is not None for text in (f"--{key}", str(value))]
    command = [sys.executable, str(REPOSITORY / "test" / name), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


FLAGS = {"n_samples": 2, "beam_width": 2, "expand": 2, "token_budget": BUDGET}


def assert_complete(lines: list[dict], search: str) -> None:
    assert [line["index"] for line in lines] == list(range(QUESTIONS))
    for line in lines:
        output = line["output"]
        assert output["sample_lst"] == [0, 1]
        assert all(0 < tokens <= BUDGET for tokens in output["token_count_lst"])
        assert all(solution.startswith(line["prompt"]) for solution in output["solution_lst"])
        assert line["settings"]["search"]["name"] == search


@pytest.mark.parametrize("search", ["dvts", "mcts"])
def test_a_search_guided_by_the_score_service_fills_a_result_file(
    search: str, infer: Callable, services: dict[str, str]
) -> None:
    lines, _ = infer(search=search, score_api_url=services["score"], **FLAGS)
    assert_complete(lines, search)


def test_a_search_guided_by_fused_scores_is_reproducible_and_measured(infer: Callable, tmp_path: Path) -> None:
    lines, _ = infer(output_file="fused.jsonl", search="beam", **FLAGS)
    assert_complete(lines, "beam")
    again, _ = infer(output_file="again.jsonl", search="beam", **FLAGS)
    assert [line["output"]["solution_lst"] for line in again] == [line["output"]["solution_lst"] for line in lines]
    metric = script("compute_metric.py", task="make10", result_paths=tmp_path / "fused.jsonl", N=1)
    assert "Test 2 times" in metric


def test_searches_do_not_mix_in_a_file_and_a_finished_one_is_not_repeated(infer: Callable) -> None:
    first, _ = infer(search="dvts", beam_width=1, expand=2, token_budget=BUDGET)
    more, said = infer(search="dvts", beam_width=1, expand=2, token_budget=BUDGET, n_samples=2)
    assert "3 of 6 samples are there already" in said
    assert [line["output"]["solution_lst"][0] for line in more] == [line["output"]["solution_lst"][0] for line in first]
    _, said = infer(status=2, search="dvts", beam_width=2, expand=2, token_budget=BUDGET)
    assert "holds results of another run (search=" in said


def test_a_majority_vote_names_its_response(infer: Callable) -> None:
    lines, _ = infer(search="majority", n_samples=1, branch=3)
    assert all(line["settings"]["search"] == {"name": "majority"} for line in lines)
    assert all(line["prompt"] + line["output"]["content"] in line["output"]["solution_lst"] for line in lines)
