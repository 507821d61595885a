"""Runs with a budget: which calibration they take, what is chosen, and what it has cost."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from xbai.calibration import Calibration, CombinedScore, ScoreChance
from xbai.cli import app
from xbai.errors import UserError
from xbai.infer.options import RunOptions
from xbai.infer.run import run_budget
from xbai.measure.budget_report import budget_of_files, report_budget
from xbai.results.lines import NOT_BEGUN, PRUNED, REFUSED
from xbai.results.response_choice import response_choice
from xbai.results.run_budget import RunBudget
from xbai.results.settings import RunSettings
from xbai.search.budget import parse_budget

RIGHT, OTHER, WRONG = (f"The answer is \\boxed{{{text}}}." for text in ("7+8-1+1-5", "8+7-1+1-5", "7+8+1+1+5"))
CHANCE = ScoreChance(2.0, 0.5)
Candidates = list[tuple[str, float | None, str, int]]
"""Text, score, finish reason and tokens of each."""

FIRST: Candidates = [
    (WRONG, None, PRUNED, 20), (RIGHT, 0.8, "stop", 40), ("", None, NOT_BEGUN, 0), ("", None, NOT_BEGUN, 0),
]  # fmt: skip
SECOND: Candidates = [
    (WRONG, 0.7, "stop", 50), (RIGHT, 0.6, "stop", 40), (WRONG, 0.1, "length", 60), (RIGHT, None, PRUNED, 10),
]  # fmt: skip
REFUSED_ALL: Candidates = [("", None, REFUSED, 0)] * 4


def write_results(path: Path, budget: RunBudget, *questions: Candidates) -> str:
    settings = {"task": "make10", "model": "m", "budget": budget.to_settings()}
    with path.open("w", encoding="utf-8") as stream:
        for index, candidates in enumerate(questions):
            texts, scores, reasons, tokens = map(list, zip(*candidates, strict=True))
            output = {
                "solution_lst": ["P" + text for text in texts],
                "score_lst": scores,
                "sample_lst": list(range(len(texts))),
                "finish_reason_lst": reasons,
                "token_count_lst": tokens,
            }
            line = {"prompt": "P", "answer": "7 8 1 1 5", "output": output, "index": index, "settings": settings}
            stream.write(json.dumps({**line, "meta": {"question": f"{index}"}}) + "\n")
    return str(path)


def test_a_group_is_one_choice_and_all_that_was_generated_is_its_cost(tmp_path: Path) -> None:
    budget = RunBudget(parse_budget("prune:0.5@1+stop:0.9/2"), 4, CHANCE)
    results = write_results(tmp_path / "out.jsonl", budget, FIRST + SECOND, SECOND + SECOND, REFUSED_ALL)
    assert budget_of_files([results]) == budget
    report = report_budget("make10", [results], budget)
    assert (report.questions, report.groups) == (3, 2)
    assert report.accuracy.mean == pytest.approx((0.5 + 0 + 0) / 3)
    assert report.tokens.mean == pytest.approx(((60 + 160) / 2 + 160 + 0) / 3)
    assert report.begun.mean == pytest.approx((3 + 4 + 4) / 3)
    assert report.pruned == pytest.approx(4 / 18)


def test_the_rule_chooses_what_a_score_alone_would_not(tmp_path: Path) -> None:
    candidates = [(OTHER, 0.8, "stop", 9), (RIGHT, 0.7, "stop", 9), (RIGHT, 0.75, "stop", 9), (WRONG, None, PRUNED, 9)]
    budget = RunBudget(parse_budget("posterior:0.9/4"), 4, CHANCE)
    results = write_results(tmp_path / "out.jsonl", budget, candidates)
    settings = {"task": "make10", "search": {"name": "best_of_n"}, "budget": budget.to_settings()}
    with response_choice(settings) as choose:
        assert choose([text for text, *_ in candidates], [score for _, score, *_ in candidates]) == RIGHT
        assert choose(["a"], [None]) == ""
    assert budget.choose([0.8, 0.7, 0.75, None], ["b", "a", "a", None]) == 2
    assert report_budget("make10", [results], budget).accuracy.mean == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["metric", "--task", "make10", "--result_paths"], ""),
        (["metric", "--task", "make10", "--N", "8", "--result_paths"], "--N 8: .* has groups of 4 candidates at most"),
        (["metric", "--task", "make10", "--compare", "other", "--result_paths"], "--compare: .*sampled with --budget"),
        (["calibrate", "--task", "make10", "--model_path", "MODEL"], "sampled with --budget stop:0.9/2; only xbai"),
    ],
)
def test_only_what_fits_such_results_is_measured(
    arguments: list[str], message: str, tmp_path: Path, tiny_model_dir: Path
) -> None:
    results = write_results(tmp_path / "out.jsonl", RunBudget(parse_budget("stop:0.9/2"), 4, CHANCE), SECOND)
    command = [str(tiny_model_dir) if each == "MODEL" else each for each in arguments]
    shown = CliRunner().invoke(app, [*command, results])
    assert shown.exit_code == (2 if message else 0)
    if message:
        assert re.match(f"error: .*{message}", shown.stderr)
        assert shown.stderr.count("\n") == 1
    else:
        assert "stop:0.9/2" in shown.stdout


def options(model: Path, **changes: object) -> RunOptions:
    return RunOptions("make10", "in", "out", str(model), "http://policy", branch=8, temperature=0.7, **changes)


SETTINGS = RunSettings("make10", "m:1a", "q", 0.7, 0.95, -1, 1.05, 64, (), 0)


def test_the_calibration_beside_the_model_is_taken(tmp_path: Path) -> None:
    assert run_budget(options(tmp_path), SETTINGS) is None
    voting = run_budget(options(tmp_path, budget="majority:0.9/2"), SETTINGS)
    assert voting == RunBudget(parse_budget("majority:0.9/2"), 8, None)
    with pytest.raises(UserError, match="no such file; xbai calibrate RESULTS --model_path MODEL writes it"):
        run_budget(options(tmp_path, budget="stop:0.9"), SETTINGS)
    combined = CombinedScore(1.0, 1.0, 1.0, 1.0)
    Calibration("m:1a", 0.7, "others", combined, CHANCE).write(tmp_path)
    budget = run_budget(options(tmp_path, budget="stop:0.9"), SETTINGS)
    assert budget == RunBudget(parse_budget("stop:0.9/1"), 8, CHANCE)
    assert RunBudget.from_settings({"budget": budget.to_settings()}) == budget
    for settings, message in (
        ({"identity": "other:2b", "temperature": 0.7}, "calibration is for other:2b"),
        ({"identity": "m:1a", "temperature": 1.0}, "sampled at temperature 0.7, but the calibration is for 1.0"),
    ):
        Calibration(questions="others", combined=combined, chance=CHANCE, **settings).write(tmp_path)
        with pytest.raises(UserError, match=message):
            run_budget(options(tmp_path, budget="stop:0.9"), SETTINGS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "half"}, "budget 'half': write stop:CHANCE"),
        ({"budget": "stop:0.9", "score_source": "none"}, "goes by scores that come with the responses"),
        ({"budget": "stop:0.9", "score_source": "service", "score_api_url": "http://s"}, "not --score_source service"),
    ],
)
def test_a_budget_that_cannot_act_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        options(tmp_path, **changes)
