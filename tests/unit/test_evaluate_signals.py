"""What candidates are chosen by: log-probs beside scores, how well each tells right from wrong, what it is worth."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xbai.measure.estimators import Estimate, expected_vote, subset_masks
from xbai.measure.graded import GradedQuestion
from xbai.measure.length_bands import length_bands
from xbai.measure.metrics import json_ready, measure, report_files
from xbai.measure.separation import separation
from xbai.measure.strategies import possible_strategies
from xbai.measure.tables import differences_grid, length_grid, question_length_grid, report_grids, show, signals_grid
from xbai.results.lines import REFUSED

LEVELS = st.sampled_from([-np.inf, 0.1, 0.2, 0.3])
GRADES = st.sampled_from([0.0, 1.0, np.nan])
RIGHT, WRONG = "The answer is \\boxed{7+8-1+1-5}.", "The answer is \\boxed{7+8+1+1+5}."


def sampled_question(rng: np.random.Generator, name: str, samples: int = 12) -> GradedQuestion:
    """Right responses have higher scores and, by another noise, higher log-probs; wrong ones are longer."""
    correct = (rng.random(samples) < 0.5).astype(float)
    return GradedQuestion(
        key=(None, name),
        scores=0.2 * correct + 0.5 * rng.random(samples),
        correct=correct,
        keys=["right" if value else f"wrong{rng.integers(3)}" for value in correct],
        step_scores=[None] * samples,
        token_counts=[int(count) for count in rng.integers(5, 30, samples) + 10 * (1 - correct)],
        finish_reasons=["stop"] * samples,
        mean_log_probs=0.3 * correct - rng.random(samples),
    )


@pytest.fixture(scope="module")
def questions() -> list[GradedQuestion]:
    rng = np.random.default_rng(0)
    return [sampled_question(rng, f"q{i}") for i in range(20)]


def pick(values: np.ndarray, correct: np.ndarray, n: int) -> float:
    """Best-of-n over all subsets, by counting."""
    chosen = [max(members, key=lambda i: values[i]) for members in map(list, combinations(range(len(values)), n))]
    return float(np.mean(correct[chosen]))


def test_log_probs_and_lengths_are_chosen_by(questions: list[GradedQuestion]) -> None:
    report = measure(questions)
    for name, values in (
        ("best_of_n_log_prob", lambda question: question.mean_log_probs),
        ("best_of_n", lambda question: question.scores),
    ):
        expected = Estimate.over([pick(values(question), question.correct, 2) for question in questions])
        assert report.curves[name][2].mean == pytest.approx(expected.mean)
        assert report.curves[name][2].standard_error == pytest.approx(expected.standard_error)
    three = sampled_question(np.random.default_rng(1), "three", 3)
    three = replace(three, correct=np.array([0.0, 1.0, 0.0]), token_counts=[30, 10, 20])
    assert measure([three]).curves["shortest"][3].mean == 1.0


def test_log_probs_that_are_not_all_there_choose_nothing(questions: list[GradedQuestion]) -> None:
    some = questions[0].mean_log_probs.copy()
    some[3] = -np.inf
    cut = replace(questions[0], mean_log_probs=some)
    assert "best_of_n_log_prob" not in possible_strategies([cut, *questions[1:]])
    reasons = ["stop"] * 12
    reasons[3] = REFUSED
    refused = replace(cut, finish_reasons=reasons)
    assert "best_of_n_log_prob" in possible_strategies([refused, *questions[1:]])
    assert measure([refused]).curves["best_of_n_log_prob"][12].mean in (0.0, 1.0)


def test_a_files_log_probs_are_read_and_older_files_have_none(tmp_path: Path) -> None:
    output = {"solution_lst": [RIGHT, WRONG], "score_lst": [0.4, 0.6], "sample_lst": [0, 1]}
    path = tmp_path / "out.jsonl"
    for more, expected in (({}, None), ({"mean_log_prob_lst": [-0.1, -0.2]}, 1.0), ({"mean_log_prob_lst": None}, None)):
        path.write_text(
            json.dumps({"prompt": "", "answer": "7 8 1 1 5", "output": output | more, "index": 0}), encoding="utf-8"
        )
        report, _ = report_files("make10", [str(path)])
        found = report.curves.get("best_of_n_log_prob")
        assert (None if found is None else found[2].mean) == expected


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.tuples(LEVELS, GRADES), min_size=1, max_size=8), min_size=1, max_size=6))
def test_aucs_are_shares_of_ordered_pairs(rows: list[list[tuple[float, float]]]) -> None:
    def ordered(pairs: list[tuple[float, float]]) -> float:
        judged = [(value, grade) for value, grade in pairs if np.isfinite(value) and not np.isnan(grade)]
        rights, wrongs = ([value for value, grade in judged if grade == side] for side in (1.0, 0.0))
        shares = [float(right > wrong) + 0.5 * (right == wrong) for right in rights for wrong in wrongs]
        return float(np.mean(shares)) if shares else float("nan")

    columns = [np.array(question).T for question in rows]
    found = separation([values for values, _ in columns], [grades for _, grades in columns])
    within = [ordered(question) for question in rows]
    expected = Estimate.over([value for value in within if not np.isnan(value)])
    assert found.within_prompt_auc.mean == pytest.approx(expected.mean, nan_ok=True)
    assert found.within_prompt_auc.standard_error == pytest.approx(expected.standard_error, nan_ok=True)
    assert found.auc == pytest.approx(ordered([pair for question in rows for pair in question]), nan_ok=True)


def test_differences_are_paired_by_question(questions: list[GradedQuestion]) -> None:
    report = measure(questions)
    assert set(report.differences) == {
        "best_of_n - majority",
        "best_of_n - best_of_n_log_prob",
        "best_of_n - random",
        "best_of_n - best_of_n at 8",
    }

    def best(question: GradedQuestion, n: int) -> float:
        return pick(question.scores, question.correct, n)

    masks = subset_masks(12, 2)
    for name, other in (
        ("majority", lambda question: expected_vote(question.votes, question.correct, masks)),
        ("best_of_n_log_prob", lambda question: pick(question.mean_log_probs, question.correct, 2)),
        ("random", lambda question: question.correct.mean()),
    ):
        expected = Estimate.over([best(question, 2) - other(question) for question in questions])
        found = report.differences[f"best_of_n - {name}"]
        assert sorted(found) == [2, 4, 8, 12]
        assert found[2].mean == pytest.approx(expected.mean)
        assert found[2].standard_error == pytest.approx(expected.standard_error)
    at_8 = report.differences["best_of_n - best_of_n at 8"]
    expected = Estimate.over([best(question, 12) - best(question, 8) for question in questions])
    assert list(at_8) == [12]
    assert (at_8[12].mean, at_8[12].standard_error) == pytest.approx((expected.mean, expected.standard_error))


def test_what_was_not_measured_has_no_differences(questions: list[GradedQuestion]) -> None:
    bare = [replace(question, mean_log_probs=np.full(12, -np.inf), keys=[None] * 12) for question in questions]
    assert set(measure(bare).differences) == {"best_of_n - random", "best_of_n - best_of_n at 8"}
    unscored = [replace(question, scores=np.full(12, -np.inf)) for question in bare]
    report = measure(unscored)
    assert report.differences == {} and report.by_length == []
    assert [grid.title.split()[0] for grid in report_grids({"a": report})] == ["Accuracy", "AUC:", "By", "Scores"]


def test_length_bands_are_thirds_and_share_out_the_choices(questions: list[GradedQuestion]) -> None:
    bands = length_bands(questions)
    assert len(bands) == 3
    assert all(one.high < other.low for one, other in pairwise(bands))
    for share in ([band.share for band in bands], [band.chosen for band in bands]):
        assert sum(share) == pytest.approx(1.0)
    assert all(0.2 < band.share < 0.45 for band in bands)
    tokens = np.concatenate([question.tokens for question in questions])
    correct = np.concatenate([question.correct for question in questions])
    for band in bands:
        inside = (tokens >= band.low) & (tokens <= band.high)
        assert band.accuracy == pytest.approx(correct[inside].mean())
        chosen = [
            pick(question.scores, (question.tokens >= band.low) & (question.tokens <= band.high), 8)
            for question in questions
        ]
        assert band.chosen == pytest.approx(np.mean(chosen))
    unknown = [replace(question, token_counts=[None] * 12) for question in questions]
    assert length_bands(unknown) == []
    same = [replace(question, token_counts=[7] * 12) for question in questions]
    assert [(band.low, band.high, band.chosen) for band in length_bands(same)] == [(7, 7, 1.0)]
    partly = [replace(question, token_counts=[None] + [7] * 11) for question in questions]
    (band,) = length_bands(partly)
    assert band.chosen < 1.0 and band.share == pytest.approx(11 / 12)


def test_length_quarters_are_of_questions_and_have_their_accuracies(questions: list[GradedQuestion]) -> None:
    unknown = replace(questions[0], token_counts=[None] * 12)
    report = measure([*questions, unknown])
    quarters = report.by_question_length
    assert [quarter.questions for quarter in quarters] == [5] * 4
    by_length = sorted(questions, key=lambda question: np.mean(question.token_counts))
    for quarter, here in zip(quarters, np.reshape(np.arange(20), (4, 5)), strict=True):
        inside = [by_length[i] for i in here]
        assert (quarter.low, quarter.high) == tuple(np.mean(inside[end].token_counts) for end in (0, -1))
        assert quarter.n == 8
        assert list(quarter.accuracies) == list(report.curves)
        for name, expected in (
            ("best_of_n", [pick(question.scores, question.correct, 8) for question in inside]),
            ("random", [question.correct.mean() for question in inside]),
        ):
            found, estimate = quarter.accuracies[name], Estimate.over(expected)
            assert (found.mean, found.standard_error) == pytest.approx((estimate.mean, estimate.standard_error))
    (section,) = question_length_grid({"a": report}).sections
    assert section[1] == ["", "questions", "5", "5", "5", "5"]
    assert measure([unknown]).by_question_length == []
    same = [replace(question, token_counts=[7] * 12) for question in questions]
    (only,) = measure([*same, same[0].only(np.zeros(12, dtype=bool))]).by_question_length
    assert (only.low, only.high, only.questions) == (7.0, 7.0, 20)


def test_the_auc_within_a_prompt_comes_first_everywhere(questions: list[GradedQuestion]) -> None:
    report = measure(questions)
    keys = list(json_ready(report))
    assert keys.index("within_prompt_auc") < keys.index("auc")
    assert list(json_ready(report)["signals"]["best_of_n_log_prob"]) == ["within_prompt_auc", "auc"]
    text = "".join(grid.to_markdown() for grid in report_grids({"results": report}))
    within = f"{report.within_prompt_auc:.3f} ±{report.within_prompt_auc_standard_error:.3f}"
    assert f"| AUC within a question | {within} |\n| AUC of the score | {report.auc:.3f} |" in text
    of_log_prob = report.signals["best_of_n_log_prob"]
    assert f"| Best-of-N by mean log-prob | {of_log_prob.within_prompt_auc.mean:.3f} ±" in text


def test_tables_of_differences_signals_and_lengths(questions: list[GradedQuestion]) -> None:
    report = measure(questions)
    differences = differences_grid({"a": report}).to_markdown()
    found = report.differences["best_of_n - majority"][2]
    assert f"| score less majority | {100 * found.mean:+.1f} ±{100 * found.standard_error:.1f} |" in differences
    assert "| score less the same at N=8 |  |  |  |" in differences
    assert len(signals_grid({"a": report, "b": report}).sections) == 2
    (rows,) = length_grid({"a": report}).sections
    assert [row[0] for row in rows] == ["a", "", ""]


def test_no_cell_is_cut_where_there_is_no_terminal(
    questions: list[GradedQuestion], capsys: pytest.CaptureFixture
) -> None:
    combined = [replace(question, combined=question.scores) for question in questions]
    repeated = [
        replace(
            question,
            **{
                name: np.tile(getattr(question, name), 3)
                for name in ("scores", "correct", "mean_log_probs", "combined")
            },
            **{name: getattr(question, name) * 3 for name in ("keys", "step_scores", "token_counts", "finish_reasons")},
        )
        for question in combined
    ]
    show(report_grids({"Before RL, held out": measure(repeated)}))
    shown = capsys.readouterr().out
    assert "score and log-prob less log-prob" in shown and "less the same at N=8" in shown
    assert "…" not in shown.replace("… by ", "")
