"""A run whose candidates only think, but for the one that is chosen to answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from clocks import wait_until
from scripted_engine import ScriptedEngine
from typer.testing import CliRunner

from xbai.cli import app
from xbai.client.wire import BrokenAnswerError, read_chosen
from xbai.errors import UserError
from xbai.infer.options import RunOptions
from xbai.infer.run import run
from xbai.serve.engine_thread import EngineThread
from xbai.serve.limits import Limits
from xbai.serve.policy import create_policy_app

N = 4
BEST = 2
QUESTIONS = ["7 8 1 1 5", "1 2 3 4 2"]
SIGNS = {"7 8 1 1 5": "7+8-1+1-5", "1 2 3 4 2": "1+2+3+4-2"}


def thinker(prompt: str, number: int) -> tuple[str, float]:
    """The best candidate thinks of signs, the others of nothing; of the second question even it is wrong, by 2."""
    if prompt.endswith("</think>"):
        return f"\n\nIt is \\boxed{{{prompt.rpartition('I say ')[2].partition(' .')[0]}}}.", 0.5
    numbers = prompt.partition("Make 10 from ")[2][: len(QUESTIONS[0])]
    thought = SIGNS[numbers] if number == BEST else "nothing"
    return f"<think>\nI say {thought} .\n\n</think>\n\nIt is \\boxed{{{thought}}}.", 0.9 - 0.01 * abs(number - BEST)


@pytest.fixture
def served(serve_app: Callable[..., str], tiny_model_dir: Path) -> tuple[str, ScriptedEngine]:
    engine = ScriptedEngine(tiny_model_dir, thinker)
    thread = EngineThread(lambda: engine)
    url = serve_app(create_policy_app(thread, str(tiny_model_dir), Limits()))
    wait_until(lambda: thread.ready, "the engine is loaded")
    return url, engine


@pytest.fixture
def options(served: tuple[str, ScriptedEngine], tmp_path: Path, tiny_model_dir: Path) -> RunOptions:
    questions = [json.dumps({"prompt": f"Make 10 from {numbers}", "answer": numbers}) for numbers in QUESTIONS]
    (tmp_path / "in.jsonl").write_text("\n".join(questions), encoding="utf-8")
    return RunOptions(
        task="make10",
        input_file=str(tmp_path / "in.jsonl"),
        output_file=str(tmp_path / "out.jsonl"),
        model_dir=str(tiny_model_dir),
        response_api_url=served[0],
        n_samples=2,
        branch=N,
        max_tokens=200,
        answer_once=True,
    )


def outputs(path: str) -> list[dict[str, Any]]:
    return [json.loads(line)["output"] for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_one_of_each_group_answers_and_is_what_is_measured(
    options: RunOptions, served: tuple[str, ScriptedEngine], tmp_path: Path
) -> None:
    run(options)
    assert len(served[1].begun) == len(QUESTIONS) * 2 * (N + 1)
    for numbers, output in zip(QUESTIONS, outputs(options.output_file), strict=True):
        reasons, texts = output["finish_reason_lst"], output["solution_lst"]
        assert [reason == "not_chosen" for reason in reasons] == [i % N != BEST for i in range(2 * N)]
        assert [text.endswith("</think>") for text in texts] == [i % N != BEST for i in range(2 * N)]
        assert output["content"].endswith(f"\\boxed{{{SIGNS[numbers]}}}.")
        assert min(output["score_lst"]) > 0.8
    report = tmp_path / "report.json"
    command = ["metric", "--task", "make10", "--result_paths", options.output_file]
    assert CliRunner().invoke(app, [*command, "--json", str(report)]).exit_code == 0
    measured = json.loads(report.read_text(encoding="utf-8"))
    assert (measured["rule"], measured["groups"], measured["candidates"]) == ("all, answer once", 2, N)
    assert measured["accuracy"]["mean"] == 0.5
    assert measured["tokens"]["mean"] * 2 * len(QUESTIONS) == sum(
        sum(output["token_count_lst"]) for output in outputs(options.output_file)
    )


def test_a_run_goes_on_and_is_not_mixed_with_another_kind(
    options: RunOptions, served: tuple[str, ScriptedEngine]
) -> None:
    run(replace(options, n_samples=1))
    begun = len(served[1].begun)
    run(options)
    assert len(served[1].begun) == 2 * begun
    run(options)
    assert len(served[1].begun) == 2 * begun
    with pytest.raises(UserError, match=r"budget=\{'rule': 'all', 'candidates': 4, .*, now None"):
        run(replace(options, answer_once=False))
    shown = CliRunner().invoke(
        app, ["metric", "--task", "make10", "--compare", "other", "--result_paths", options.output_file]
    )
    assert shown.exit_code == 2 and "was sampled with --answer_once;" in shown.stderr


def test_its_response_is_the_one_of_whole_candidates(options: RunOptions, tmp_path: Path) -> None:
    run(options)
    # The same requests, and so the same seeds.
    run(replace(options, answer_once=False, response_num=N, output_file=str(tmp_path / "whole.jsonl")))
    once, whole = outputs(options.output_file), outputs(str(tmp_path / "whole.jsonl"))
    assert [output["content"] for output in once] == [output["content"] for output in whole]
    assert [output["score_lst"] for output in once] == [output["score_lst"] for output in whole]
    assert all(sum(one["token_count_lst"]) < sum(other["token_count_lst"]) for one, other in zip(once, whole))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch": 1}, "--answer_once: there is one candidate, so nothing to choose; give --branch or --effort"),
        ({"budget": "majority:0.9"}, "--answer_once: --budget majority:0.9 compares the answers of all candidates"),
        ({"score_source": "none"}, "--answer_once: goes by scores that come with the responses"),
    ],
)
def test_what_it_does_not_go_with(changes: dict[str, Any], message: str, options: RunOptions) -> None:
    with pytest.raises(UserError, match=message):
        replace(options, **changes)


def test_a_service_that_knows_nothing_of_it_is_found_out() -> None:
    answer = httpx.Response(200, json={"results": ["a", "b"]})
    with pytest.raises(BrokenAnswerError, match="chosen: None, of 2 responses of which one was to answer"):
        read_chosen(answer.content, 2)
