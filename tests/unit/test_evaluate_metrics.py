"""Result files to reports, the summary, the tables and the figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from xbai.errors import UserError
from xbai.measure.estimators import Estimate
from xbai.measure.graded import GradedQuestion
from xbai.measure.metric_command import run_metric
from xbai.measure.metrics import Report, compare, json_ready, measure, repeated_accuracy, report_files
from xbai.measure.options import MetricOptions
from xbai.measure.plots import plot_accuracy, plot_results, step_curve
from xbai.measure.strategies import candidate_counts, possible_strategies
from xbai.measure.summary import build_summary
from xbai.measure.tables import STRATEGY_NAMES, accuracy_grid, comparison_grid, quality_grid, show

RIGHT, WRONG = "The answer is \\boxed{7+8-1+1-5}.", "The answer is \\boxed{7+8+1+1+5}."


def question(scores: list[float], correct: list[float], name: str = "p", length: int = 10) -> GradedQuestion:
    count = len(scores)
    return GradedQuestion(
        key=(None, name),
        scores=np.array(scores),
        correct=np.array(correct),
        keys=["right" if value > 0.5 else f"wrong{i}" for i, value in enumerate(correct)],
        step_scores=[[score, score] if np.isfinite(score) else None for score in scores],
        token_counts=[length] * count,
        finish_reasons=["stop"] * count,
        mean_log_probs=np.full(count, -np.inf),
    )


def random_questions(count: int, samples: int, seed: int = 0) -> list[GradedQuestion]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        correct = (rng.random(samples) < 0.4).astype(float)
        scored = question(list(0.3 * rng.random(samples) + 0.2 * correct + 0.3), list(correct), f"p{i}")
        log_probs = 0.1 * correct - rng.random(samples)
        steps = {"step_ends": [[50]] * samples, "step_log_probs": [[50 * value, 0.0] for value in log_probs]}
        made.append(replace(scored, mean_log_probs=log_probs, combined=log_probs + scored.scores, **steps))
    return made


def result_line(index: int, responses: list[str], scores: list[float | None]) -> dict:
    output = {"content": "", "time": 1.0, "solution_lst": ["P" + text for text in responses], "score_lst": scores}
    return {"prompt": "P", "answer": "7 8 1 1 5", "output": output, "index": index}


def write(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_report_of_a_file_with_the_published_keys_only(tmp_path: Path) -> None:
    line = result_line(0, [RIGHT, WRONG, WRONG, RIGHT], [0.9, 0.1, 0.95, None])
    report, questions = report_files("make10", [str(write(tmp_path / "a.jsonl", line))])
    assert (report.questions, report.samples, report.ungraded, report.unscored) == (1, 4, 0, 1)
    assert report.mean_at_1.mean == 0.5
    assert report.curves["best_of_n"][4].mean == 0.0, "the highest score is wrong"
    assert report.curves["majority"][4].mean == 0.5, "two against two"
    assert report.curves["oracle"][2].mean == pytest.approx(5 / 6)
    assert not set(report.curves) & {"best_of_n_min", "best_of_n_last"}, "there are no step scores"
    assert report.auc == 0.5, "the candidate without a score has no say"
    assert np.isnan(report.truncated_rate) and np.isnan(report.lengths.mean)
    assert repeated_accuracy(questions, 2) == [1.0, 0.0]
    assert repeated_accuracy(questions, 3) == [0.0]


def test_best_of_n_under_each_aggregation() -> None:
    candidates = replace(question([0.6, 0.5], [1.0, 0.0]), step_scores=[[0.9, 0.4], [0.5, 0.5]])
    chosen = {name: curve[2].mean for name, curve in measure([candidates]).curves.items()}
    assert chosen["best_of_n"] == chosen["best_of_n_arithmetic"] == chosen["best_of_n_product"] == 1.0
    assert chosen["best_of_n_min"] == chosen["best_of_n_last"] == 0.0


def test_step_scores_stand_in_for_a_missing_score(tmp_path: Path) -> None:
    line = result_line(0, [RIGHT, WRONG], [None, 0.3])
    line["output"]["step_score_lst"] = [[0.9, 0.4], [0.3]]
    _, (only,) = report_files("make10", [str(write(tmp_path / "a.jsonl", line))])
    assert only.scores == pytest.approx([0.6, 0.3])


def test_without_scores_nothing_is_chosen_by_score() -> None:
    unscored = [question([-np.inf] * 4, [1.0, 1.0, 0.0, 0.0])]
    report = measure(unscored)
    assert set(report.curves) == {"majority", "oracle", "random", "shortest"}
    assert report.unscored == 4 and np.isnan(report.auc) and report.reliability == []
    assert repeated_accuracy(unscored, 1) == [1.0, 1.0, 0.0, 0.0]
    assert repeated_accuracy(unscored, 2, "majority") == [1.0, 0.0]
    with pytest.raises(UserError, match="--N 2: there are no scores"):
        repeated_accuracy(unscored, 2)


def test_without_answers_there_is_no_vote() -> None:
    program = replace(question([0.5, 0.6], [1.0, 0.0]), keys=[None, None])
    assert not set(possible_strategies([program])) & {"majority", "weighted_vote"}


def test_a_group_larger_than_the_samples_is_refused() -> None:
    with pytest.raises(UserError, match=r"--N 3: only 2 candidates .* use --N 2 or less"):
        repeated_accuracy([question([0.1, 0.2], [0.0, 1.0]), question([0.1] * 4, [0.0] * 4)], 3)


def test_missing_refused_and_truncated_candidates_are_counted() -> None:
    whole = replace(question([0.5] * 4, [1.0] * 4), finish_reasons=["stop", "length", "refused", None])
    report = measure([whole, question([0.5, 0.4], [0.0, 1.0])])
    assert (report.samples, report.missing, report.refused) == (2, 2, 1)
    assert report.truncated_rate == pytest.approx(1 / 5)


def test_lengths_of_right_and_wrong() -> None:
    counted = replace(question([0.5] * 4, [1.0, 0.0, 1.0, np.nan]), token_counts=[10, 40, 20, None])
    lengths = measure([counted]).lengths
    assert (lengths.mean, lengths.right, lengths.wrong) == (pytest.approx(70 / 3), 15.0, 40.0)
    assert lengths.percentiles[50] == 20.0


def test_comparison_is_paired() -> None:
    base = random_questions(30, 8)
    better = [replace(each, correct=np.maximum(each.correct, np.arange(8) == 0)) for each in base]
    comparison = compare([*better, question([0.5], [1.0], "extra")], base)
    differences = [new.correct.mean() - old.correct.mean() for new, old in zip(better, base)]
    assert (comparison.questions, comparison.unpaired) == (30, 1)
    assert comparison.curves["random"][1] == Estimate.over(differences)
    alone = measure(base).mean_at_1.standard_error
    assert comparison.curves["random"][1].standard_error < alone
    assert all(estimate.mean == 0.0 for curve in compare(base, base).curves.values() for estimate in curve.values())
    with pytest.raises(UserError, match="no question in common"):
        compare(base, [question([0.5], [1.0], "other")])


def test_ungraded_candidates_are_counted_and_left_out() -> None:
    report = measure([question([0.9, 0.5, 0.2], [np.nan, 1.0, 0.0]), question([0.1, 0.2, 0.3], [np.nan] * 3)])
    assert (report.questions, report.ungraded) == (2, 4)
    assert report.curves["best_of_n"][2].mean == 1.0
    assert report.mean_at_1.mean == 0.5
    with pytest.raises(UserError, match="graded"):
        measure([question([0.1], [np.nan])])


def test_auc_within_prompts_ignores_how_prompts_differ() -> None:
    easy = question([0.9, 0.8, 0.95], [1.0, 0.0, 1.0])
    hard = question([0.3, 0.1, 0.2], [1.0, 0.0, 0.0])
    solved = question([0.5, 0.6, 0.4], [1.0, 1.0, 1.0])
    report = measure([easy, hard, solved])
    assert report.within_prompt_auc == 1.0
    assert report.auc == pytest.approx(14 / 18)


def test_standard_error_is_over_questions() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    estimate = Estimate.over(values)
    assert estimate.mean == pytest.approx(0.6)
    assert estimate.standard_error == pytest.approx(np.std(values, ddof=1) / np.sqrt(5))
    assert np.isnan(Estimate.over([1.0]).standard_error)


@pytest.mark.parametrize(("samples", "counts"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (32, [1, 2, 4, 8, 16, 32])])
def test_candidate_counts(samples: int, counts: list[int]) -> None:
    assert candidate_counts(samples) == counts


def settings(**changes: object) -> dict:
    return {"task": "make10", "questions": "d", "temperature": 1.0, "max_tokens": 200, **changes}


def reports() -> tuple[Report, Report]:
    return measure(random_questions(12, 32), settings()), measure(random_questions(12, 32, seed=1), settings())


def test_summary_has_what_the_acceptance_reads() -> None:
    base, rl = reports()
    summary = json.loads(json.dumps(build_summary(base, rl, 600.0), allow_nan=False))
    assert (summary["seconds_total"], summary["problems"], summary["samples"]) == (600.0, 12, 32)
    assert summary["temperature"] == 1.0
    assert summary["pass_at_1"] == {"base": base.mean_at_1.mean, "rl": rl.mean_at_1.mean}
    for part, report in ((summary, rl), (summary["base_model"], base)):
        for strategy in ("best_of_n", "majority", "oracle", "random"):
            assert part[strategy] == {str(n): report.curves[strategy][n].mean for n in (2, 8, 32)}
        assert (part["auc"], part["within_prompt_auc"]) == (report.auc, report.within_prompt_auc)


def test_summary_says_what_is_free_where_the_files_do() -> None:
    base, rl = reports()
    summary = build_summary(base, rl, score_setting={"loss": "pairwise"})
    assert summary["score_setting"] == {"loss": "pairwise"}
    for part, report in ((summary, rl), (summary["base_model"], base)):
        for name, curve in (("mean_log_prob", "best_of_n_log_prob"), ("shortest", "shortest")):
            curve = {str(n): report.curves[curve][n] for n in (2, 8, 32)}
            assert part["free_baselines"][name] == {n: estimate.mean for n, estimate in curve.items()}
            assert part["standard_errors"][name] == {n: estimate.standard_error for n, estimate in curve.items()}
        assert part["standard_errors"]["best_of_n"]["8"] == report.curves["best_of_n"][8].standard_error
        found = part["differences"]["best_of_n - majority"]
        assert set(found) == {"2", "8", "32"}
        assert found["8"]["mean"] == pytest.approx(part["best_of_n"]["8"] - part["majority"]["8"])
        assert list(part["differences"]["best_of_n - best_of_n at 8"]) == ["32"]
        assert part["within_prompt_auc_standard_error"] == report.within_prompt_auc_standard_error
    bare = [replace(each, mean_log_probs=np.full(32, -np.inf), combined=None) for each in random_questions(3, 32)]
    summary = build_summary(measure(bare, settings()), measure(bare, settings()))
    for part in (summary, summary["base_model"]):
        assert not {"free_baselines", "best_of_n_combined"} & set(part)
        assert not any("log_prob" in name for name in part["differences"])


def test_summary_of_held_out_questions_has_the_same_keys() -> None:
    base, rl = reports()
    others = [measure(random_questions(5, 32, seed), settings(questions="held out")) for seed in (2, 3)]
    summary = build_summary(base, rl, None, others[0], others[1])
    run_only = {"seconds_total", "samples", "temperature", "held_out"}
    assert set(summary["held_out"]) == set(summary) - run_only
    assert set(summary["held_out"]["base_model"]) == set(summary["base_model"])
    assert summary["held_out"]["problems"] == 5
    assert summary["held_out"]["best_of_n"]["8"] == others[0].curves["best_of_n"][8].mean
    assert summary["held_out"]["pass_at_1"] == {"rl": others[0].mean_at_1.mean, "base": others[1].mean_at_1.mean}
    alone = build_summary(base, rl, None, others[0])["held_out"]
    assert "base_model" not in alone and set(alone["pass_at_1"]) == {"rl"}
    other_model = measure(random_questions(5, 32), settings(questions="held out", policy="m:2"))
    theirs = measure(random_questions(12, 32), settings(policy="m:1"))
    with pytest.raises(UserError, match=r"--held_out and the results of the same model differ in policy"):
        build_summary(base, theirs, None, other_model)


def test_summary_needs_scores_of_the_trained_model_alone() -> None:
    scored = random_questions(6, 32)
    bare = [replace(each, scores=np.full(32, -np.inf), combined=None) for each in scored]
    summary = build_summary(measure(bare, settings()), measure(scored, settings()))
    base = summary["base_model"]
    assert "best_of_n" not in base and "best_of_n" in summary
    for part in ("random", "majority", "oracle", "free_baselines"):
        assert base[part] == summary[part], "the same responses"
    with pytest.raises(UserError, match="the summary needs scores"):
        build_summary(measure(scored, settings()), measure(bare, settings()))


def test_summary_refuses_unlike_runs() -> None:
    base = measure(random_questions(3, 32), settings())
    with pytest.raises(UserError, match=r"differ in temperature \(1.0, 0.7\)"):
        build_summary(base, measure(random_questions(3, 32), settings(temperature=0.7)))
    with pytest.raises(UserError, match=r"differ in top_p \(None, 0.9\); search \(None, {'name': 'beam'}\)"):
        build_summary(base, measure(random_questions(3, 32), settings(top_p=0.9, search={"name": "beam"})))
    with pytest.raises(UserError, match=r"differ in the number of questions \(3, 2\)"):
        build_summary(base, measure(random_questions(2, 32), settings()))
    build_summary(base, measure(random_questions(3, 32), settings(model="rl", policy="rl:1", lang="en", seed=1)))
    with pytest.raises(UserError, match="needs N=32, but a question has only 8"):
        build_summary(base, measure(random_questions(3, 8), settings()))


def test_a_report_is_valid_json_even_where_undefined() -> None:
    report = measure([question([0.5, 0.6], [1.0, 1.0])])
    values = json.loads(json.dumps(json_ready(report), allow_nan=False))
    assert values["auc"] is None
    assert values["curves"]["oracle"]["2"] == {"mean": 1.0, "standard_error": None}


def test_tables_show_every_number(capsys: pytest.CaptureFixture) -> None:
    base, rl = reports()
    grids = [accuracy_grid({"Before": base, "After": rl}), quality_grid({"After": rl})]
    show(grids)
    shown = capsys.readouterr().out
    for text in (shown, "".join(grid.to_markdown() for grid in grids)):
        assert f"{100 * base.curves['best_of_n'][32].mean:.1f} ±" in text
        assert f"{rl.auc:.3f}" in text
        assert all(name in text for name in STRATEGY_NAMES.values())


def test_markdown_is_a_table() -> None:
    base, _ = reports()
    title, blank, *rows, end = accuracy_grid({"a|b": base}).to_markdown().split("\n")
    assert title.startswith("**Accuracy") and (blank, end) == ("", "")
    assert len({row.replace("\\|", "").count("|") for row in rows}) == 1
    assert "a\\|b" in rows[2]


def test_differences_have_signs() -> None:
    new, old = random_questions(5, 4), random_questions(5, 4, seed=1)
    for comparison, sign in ((compare(new, old, (settings(), settings(model="m"))), "+"), (compare(old, new), "-")):
        grid = comparison_grid(comparison, "new", "old")
        for row, curve in zip(grid.sections[0], comparison.curves.values(), strict=True):
            signed = [cell.split(" ±")[0] for cell in row[grid.labels :]]
            assert signed == [f"{100 * estimate.mean:+.1f}" for estimate in curve.values()]
            assert signed[0].startswith(sign)
    title = comparison_grid(compare(new, old, (settings(), settings(model="m"))), "new", "old").title
    assert "new less old" in title and "5 questions paired); other model" in title


def drawn(path: Path) -> float:
    """Share of pixels that are not white."""
    pixels = image.imread(path)[..., :3]
    return float((pixels < 0.98).any(-1).mean())


def test_figures_are_drawn(tmp_path: Path) -> None:
    base, rl = reports()
    plot_accuracy({"Before RL": base, "After RL": rl}, tmp_path / "accuracy.png")
    plot_results({"rl": rl, "base": base}, random_questions(12, 32, seed=1), tmp_path / "results.png")
    for name in ("accuracy", "results"):
        assert 0.02 < drawn(tmp_path / f"{name}.png") < 0.6


def test_panels_of_unlike_reports_show_all_and_name_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    right, wrong = (
        replace(reports()[0], curves={strategy: {n: Estimate(mean, 0.0) for n in (1, 2, 4)} for strategy in names})
        for mean, names in ((0.9, ("random", "majority")), (0.1, ("random", "best_of_n")))
    )
    plot_accuracy({"high": right, "low": wrong}, tmp_path / "accuracy.png")
    bottom, top = figures[0].axes[1].get_ylim()
    assert bottom < 0.1 < 0.9 < top
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["Best-of-N", "majority vote", "pass@1"]


def test_a_figure_needs_neither_scores_nor_tokens(tmp_path: Path) -> None:
    bare = [replace(question([-np.inf], [1.0]), token_counts=[None])]
    for suffix, begins in ((".svg", b"<?xml"), (".pdf", b"%PDF"), (".png", b"\x89PNG")):
        path = tmp_path / f"bare{suffix}"
        plot_results({"bare": measure(bare)}, bare, path)
        assert path.read_bytes().startswith(begins)
    with pytest.raises(UserError, match=r"ends in \.png, \.pdf, \.svg"):
        plot_results({"bare": measure(bare)}, bare, tmp_path / "bare.gif")


def test_step_curves_are_stretched_and_averaged() -> None:
    rising = replace(question([0.5, 0.5], [1.0, 1.0], "a"), step_scores=[[0.0, 1.0], [0.5]])
    other = replace(question([0.5, 0.5], [1.0, 0.0], "b"), step_scores=[[0.5, 0.5, 0.5], []])
    curve = step_curve([rising, other], right=True)
    assert curve.responses == 3
    assert curve.mean[[0, 10, 20]] == pytest.approx([1 / 3, 0.5, 2 / 3])
    assert step_curve([rising, other], right=False) is None


def test_the_command_writes_what_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ours = write(tmp_path / "ours.jsonl", result_line(0, [RIGHT, WRONG], [0.9, 0.1]))
    base = write(tmp_path / "base.jsonl", result_line(0, [WRONG, WRONG], [0.9, 0.1]))
    options = MetricOptions(
        "make10", [str(ours)], 2, (), [str(base)], tmp_path / "m.json", Path("-"), tmp_path / "m.png"
    )
    run_metric(options)
    printed = capsys.readouterr().out
    assert printed.startswith("Test 1 times  \npass@1 (Best-of-2): 100.00\n")
    assert "**ours less base" in printed and "─" not in printed, "Markdown takes the place of the tables"
    values = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    assert values["repeated"] == {"strategy": "best_of_n", "n": 2, "repetitions": 1, "accuracies": [1.0], "mean": 1.0}
    assert values["base"]["mean_at_1"]["mean"] == 0.0
    assert values["difference"]["curves"]["best_of_n"]["2"] == {"mean": 1.0, "standard_error": None}
    assert drawn(tmp_path / "m.png") > 0.02


@pytest.mark.parametrize("option", ["json_path", "markdown_path", "plot_path"])
def test_an_output_that_cannot_be_written_is_refused_before_results_are_read(tmp_path: Path, option: str) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UserError, match=r"a\.png: a folder; name a file"):
        run_metric(replace(MetricOptions("make10", ["no such file"]), **{option: tmp_path / "a.png"}))


def test_a_vote_that_the_run_asked_for_is_what_is_tested(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = result_line(0, [RIGHT, RIGHT, WRONG], [0.1, 0.1, 0.9]) | {"settings": {"search": {"name": "majority"}}}
    run_metric(MetricOptions("make10", [str(write(tmp_path / "a.jsonl", line))], 3))
    assert "pass@1 (majority vote of 3): 100.00" in capsys.readouterr().out
