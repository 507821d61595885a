"""Rules of a budget on stored samples: what they choose, what that costs, and that it is said honestly."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from xbai.cli import app
from xbai.measure import replay as replay_module
from xbai.measure.estimators import expected_best_of_n
from xbai.measure.graded import GradedQuestion
from xbai.measure.replay import replay
from xbai.measure.replay_families import families, replay_family
from xbai.measure.replay_fit import Replay, halves
from xbai.measure.replay_questions import SIGNALS, SampledQuestion, possible_signals, sampled_question
from xbai.search.budget import parse_budget
from xbai.search.rule import Candidate, Rule

RIGHT, WRONG = "The answer is \\boxed{7+8-1+1-5}.", ("\\boxed{7+8+1+1+5}", "\\boxed{7*8}", "\\boxed{8-7}")


def sampled_questions(count: int, samples: int, seed: int = 0) -> list[GradedQuestion]:
    """Scores and log-probs tell right from wrong by noises of their own."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        ease = rng.normal()
        correct = (rng.random(samples) < 1 / (1 + math.exp(-ease))).astype(float)
        steps = [
            (1 / (1 + np.exp(-ease - 1.5 * right - rng.normal(size=rng.integers(0, 5))))).tolist() for right in correct
        ]
        ends = [np.cumsum(rng.integers(1, 20, len(each))).tolist() for each in steps]
        tokens = [(each[-1] if each else 0) + int(rng.integers(1, 20)) for each in ends]
        log_probs = [
            (-rng.random(len(each) + 1) * (1.2 - 0.5 * right)).tolist()
            for each, right in zip(steps, correct, strict=True)
        ]
        made.append(
            GradedQuestion(
                key=(number, f"q{number}"),
                scores=np.array([math.exp(np.log(each).mean()) if each else 0.0 for each in steps]),
                correct=correct,
                keys=["right" if right else f"wrong {rng.integers(3)}" for right in correct],
                step_scores=steps,
                token_counts=tokens,
                finish_reasons=["stop"] * samples,
                mean_log_probs=np.array([sum(each) / of for each, of in zip(log_probs, tokens, strict=True)]),
                step_ends=ends,
                step_log_probs=log_probs,
            )
        )
    return made


def question_of(*samples: tuple[list[float], list[int], int, float, str]) -> SampledQuestion:
    """From values, ends of steps, tokens, grade and answer of each."""
    values, ends, tokens, correct, answers = map(list, zip(*samples, strict=True))
    candidates = [
        Candidate(each, each[-1] if each else 0.0, answer=answer) for each, answer in zip(values, answers, strict=True)
    ]
    return SampledQuestion(candidates, np.array(correct), tokens, ends)


@pytest.fixture
def one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the file."""
    monkeypatch.setattr(replay_module, "orders", lambda samples: [list(range(samples))])


def test_a_rule_that_never_stops_is_best_of_n() -> None:
    questions = sampled_questions(20, 8)
    outcomes = replay(Rule(), [sampled_question(each, "score") for each in questions], [None] * 20, 8).last()
    for number, question in enumerate(questions):
        # Of samples without steps several have the score 0.
        if np.count_nonzero(question.scores == question.scores.max()) == 1:
            assert (outcomes.correct[number] == expected_best_of_n(question.scores, question.correct, 8)).all()
        assert (outcomes.tokens[number] == sum(map(int, question.tokens))).all()
    assert (outcomes.begun == 8).all() and (outcomes.pruned == 0).all()


@pytest.mark.usefixtures("one_order")
def test_a_wave_costs_what_is_decoded_until_its_decisions_fall() -> None:
    question = question_of(
        ([0.9, 0.8], [10, 30], 40, 1.0, "a"),
        ([0.2, 0.9], [25, 35], 50, 0.0, "b"),  # Given up when all have a step, at its own 25th token.
        ([0.3], [5], 12, 0.0, "c"),  # Given up then, too, but it had ended.
        ([0.7, 0.1], [8, 20], 90, 0.0, "d"),  # Given up when both that are left have two steps, at 30.
    )
    outcome = replay(parse_budget("prune:0.5@1,2"), [question], [None], 4).last()
    assert (outcome.tokens.item(), outcome.pruned.item(), outcome.correct.item()) == (40 + 25 + 12 + 30, 3, 1.0)
    late = question_of(([0.9], [10], 100, 1.0, "a"), ([0.1, 0.1], [10, 20], 60, 0.0, "b"))
    # That the first ends after one step is known only at its end.
    assert replay(parse_budget("prune:0.5@2"), [late], [None], 2).last().tokens.item() == 160


@pytest.mark.usefixtures("one_order")
def test_a_majority_stops_when_it_is_sure() -> None:
    same, other = ([0.5], [3], 10, 1.0, "a"), ([0.9], [3], 7, 0.0, "b")
    outcome = replay(
        parse_budget("majority:0.9/1"), [question_of(other, same, same, same, same, same, other)], [None], 7
    )
    assert outcome.last().correct.item() == 1.0
    assert (outcome.last().begun.item(), outcome.last().tokens.item()) == (6, 57)


@given(st.integers(0, 1000), st.sampled_from(["prune:0.5@1", "prune:0.25@1,3", "prune:0.5@2+stop:0.6/4"]))
@settings(deadline=None, max_examples=30)
def test_pruning_never_costs_more(seed: int, text: str) -> None:
    questions = [sampled_question(each, "score") for each in sampled_questions(2, 8, seed)]
    rule = parse_budget(text)
    outcomes = replay(rule, questions, [lambda score: score] * 2, 8)
    for question, tokens, begun in zip(questions, outcomes.tokens, outcomes.begun, strict=True):
        for order, spent, so_many in zip(replay_module.orders(8), tokens, begun, strict=True):
            for after, count in zip(spent, so_many, strict=True):
                assert 0 < after <= sum(question.tokens[number] for number in order[: int(count)])


@pytest.mark.parametrize("family", families(list(SIGNALS)), ids=lambda family: f"{family.kind}-{family.signal}")
def test_rules_that_share_a_walk_do_what_each_does_alone(family) -> None:
    """Nine samples: the last wave is not full."""
    questions = [sampled_question(each, family.signal) for each in sampled_questions(3, 9, seed=7)]
    chances = [lambda score: score] * 3
    together = replay_family(family, questions, chances, 9)
    for number, text in enumerate(together.rules):
        alone = replay(parse_budget(text), questions, chances, 9).last().mean()
        assert together.correct[number] == pytest.approx(alone.correct)
        assert together.tokens[number] == pytest.approx(alone.tokens)
    assert len(set(together.rules)) == len(together.rules)


@pytest.mark.parametrize("signal", list(SIGNALS))
def test_a_sample_is_worth_in_the_end_what_its_last_value_says(signal: str) -> None:
    """But for what follows the last step, of which only log-probs know."""
    for question in sampled_questions(10, 8):
        for number, candidate in enumerate(sampled_question(question, signal).candidates):
            if signal == "log_prob":
                ends, log_probs = question.step_ends[number], question.step_log_probs[number]
                means = [sum(log_probs[: step + 1]) / end for step, end in enumerate(ends)]
                assert candidate.values == pytest.approx(np.exp(means).tolist())
                assert candidate.score == pytest.approx(math.exp(sum(log_probs) / question.token_counts[number]))
            else:
                assert (candidate.values or [0.0])[-1] == pytest.approx(candidate.score)


def test_without_log_probs_nothing_goes_by_them() -> None:
    questions = sampled_questions(2, 3)
    assert possible_signals(questions) == list(SIGNALS)
    without = replace(questions[1], mean_log_probs=np.full(3, -np.inf), step_log_probs=[None] * 3)
    assert possible_signals([questions[0], without]) == ["score", "last_step"]


def test_what_is_chosen_on_a_half_does_not_know_the_other() -> None:
    questions = sampled_questions(24, 8)
    first = halves(24)
    assert abs(first.sum() - 12) == 0
    # In the other half the best-scored half of the samples is right, whatever was.
    turned = [
        each if is_first else replace(each, correct=(each.scores > np.median(each.scores)).astype(float))
        for each, is_first in zip(questions, first, strict=True)
    ]
    plain, other = Replay(questions, 8), Replay(turned, 8)
    changed = 0
    for run, of_turned in zip(plain.runs(8), other.runs(8), strict=True):
        fit, fit_of_turned = plain.fit(run, 8, 0.0), other.fit(of_turned, 8, 0.0)
        assert fit.rules_of_halves[0] == fit_of_turned.rules_of_halves[0], run.family
        assert (run.own.tokens[:, first] == of_turned.own.tokens[:, first]).all()
        if run.family.needs_chance:
            assert (run.other.tokens[:, ~first] == of_turned.other.tokens[:, ~first]).all()
        changed += fit.rules_of_halves[1] != fit_of_turned.rules_of_halves[1]
    assert changed > 0


def write_results(path: Path, questions: list[GradedQuestion], **changes: object) -> Path:
    settings = {"task": "make10", "temperature": 0.7, "questions": "d", "policy": "m:1", "scorer": "m:1"}
    with path.open("w", encoding="utf-8") as stream:
        for index, question in enumerate(questions):
            texts = [RIGHT if key == "right" else WRONG[int(key[-1])] for key in question.keys]
            output = {
                "solution_lst": ["P" + text for text in texts],
                "score_lst": question.scores.tolist(),
                "sample_lst": list(range(len(texts))),
                "finish_reason_lst": question.finish_reasons,
                "token_count_lst": question.token_counts,
                "step_score_lst": question.step_scores,
                "mean_log_prob_lst": question.mean_log_probs.tolist(),
                "step_end_lst": question.step_ends,
                "step_log_prob_lst": question.step_log_probs,
                **(changes.get("output") or {}),
            }
            line = {"prompt": "P", "answer": "7 8 1 1 5", "output": output, "index": index, "meta": {}}
            stream.write(json.dumps({**line, "settings": settings | (changes.get("settings") or {})}) + "\n")
    return path


def test_the_command_writes_tables_numbers_and_a_figure(tmp_path: Path) -> None:
    results = write_results(tmp_path / "out.jsonl", sampled_questions(16, 10))
    arguments = ["--task", "make10", "--n", "10", "--budget", "stop:0.7/2", "--budget", "majority:0.9"]
    outputs = [f"{option}={tmp_path / name}" for option, name in (("--json", "r.json"), ("--plot", "r.png"))]
    shown = CliRunner().invoke(app, ["replay", str(results), *arguments, *outputs], catch_exceptions=False)
    assert shown.exit_code == 0, shown.stderr
    assert "To reach Best-of-8" in shown.stdout and "To reach Best-of-10" in shown.stdout
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert set(found["best_of_n"]) == {"1", "2", "4", "8", "10"}
    for target in ("8", "10"):
        for kind, by_signal in found["fitted"][target].items():
            for fitted in by_signal.values():
                assert str(parse_budget(fitted["rule"])) == fitted["rule"] and kind.split("+")[0] in fitted["rule"]
                assert fitted["share"] <= 1.0
    assert [each["rule"] for each in found["budget"]] == ["stop:0.7/2", "majority:0.9/1"]
    for curve in found["curves"]:
        tokens = [point["tokens"]["mean"] for point in curve["points"]]
        assert all(one <= other for one, other in pairwise(tokens)), "a higher threshold stops no earlier"
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"output": {"step_end_lst": None}}, [], "does not say where the steps of each response end; sample again"),
        (
            {"settings": {"budget": {"rule": "stop:0.9/1", "candidates": 8, "chance": None}}},
            [],
            "sampled with --budget stop:0.9/1",
        ),
        ({}, ["--n", "9"], "--n 9: .* has 8 samples for the question"),
        ({}, ["--budget", "stop:2"], "budget 'stop:2': write"),
        ({}, ["--calibration", "nowhere"], "--calibration: gives chances to the rules of --budget"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(tmp_path: Path, changes: dict, arguments: list, message: str) -> None:
    results = write_results(tmp_path / "out.jsonl", sampled_questions(3, 8), **changes)
    shown = CliRunner().invoke(app, ["replay", str(results), "--task", "make10", "--n", "8", *arguments])
    assert shown.exit_code == 2
    assert shown.stderr.startswith("error: ") and shown.stderr.count("\n") == 1
    assert re.search(message, shown.stderr)
