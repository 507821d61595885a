"""Result files to reports, the summary, the tables and the figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from rich.console import Console

from xbai.errors import UserError
from xbai.evaluate.metrics import (
    Estimate,
    GradedQuestion,
    Report,
    candidate_counts,
    measure,
    read_lines,
    repeated_best_of_n,
    report_files,
    result_files,
)
from xbai.evaluate.plots import plot_accuracy, plot_step_scores, plot_training
from xbai.evaluate.summary import build_summary
from xbai.evaluate.tables import accuracy_table, quality_table

RIGHT, WRONG = "The answer is \\boxed{7+8-1+1-5}.", "The answer is \\boxed{7+8+1+1+5}."


def question(scores: list[float], correct: list[float], prompt: str = "p") -> GradedQuestion:
    count = len(scores)
    keys = ["right" if value > 0.5 else f"wrong{i}" for i, value in enumerate(correct)]
    steps = [[score, score] for score in scores]
    return GradedQuestion(prompt, np.array(scores), np.array(correct), keys, steps, [10] * count, [False] * count)


def random_questions(count: int, samples: int, seed: int = 0) -> list[GradedQuestion]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        correct = (rng.random(samples) < 0.4).astype(float)
        made.append(question(list(0.3 * rng.random(samples) + 0.2 * correct + 0.3), list(correct), f"p{i}"))
    return made


def result_line(index: int, responses: list[str], scores: list[float | None]) -> dict:
    output = {"content": "", "time": 1.0, "solution_lst": ["P" + text for text in responses], "score_lst": scores}
    return {"prompt": "P", "answer": "7 8 1 1 5", "output": output, "index": index}


def write(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_report_of_a_file_with_the_published_keys_only(tmp_path: Path) -> None:
    line = result_line(0, [RIGHT, WRONG, WRONG, RIGHT], [0.9, 0.1, 0.95, None])
    report, questions = report_files("make10", str(write(tmp_path / "a.jsonl", line)))
    assert (report.questions, report.samples, report.ungraded, report.unscored) == (1, 4, 0, 1)
    assert report.mean_at_1.mean == 0.5
    assert report.curves["best_of_n"][4].mean == 0.0, "the highest score is wrong"
    assert report.curves["majority"][4].mean == 0.5, "two against two"
    assert report.curves["oracle"][2].mean == pytest.approx(5 / 6)
    assert report.auc == 0.5, "the candidate without a score has no say"
    assert repeated_best_of_n(questions, 2) == [1.0, 0.0]
    assert repeated_best_of_n(questions, 3) == [0.0]


def test_files_of_a_glob_are_put_together(tmp_path: Path) -> None:
    write(tmp_path / "part0.jsonl", result_line(0, [RIGHT], [0.5]))
    write(tmp_path / "part1.jsonl", result_line(0, [WRONG], [0.4]))
    (tmp_path / "part2.jsonl.journal").write_text("{}")
    report, _ = report_files("make10", str(tmp_path / "part*"))
    assert (report.questions, report.samples, report.mean_at_1.mean) == (1, 2, 0.5)


def test_questions_of_the_same_text_stay_apart(tmp_path: Path) -> None:
    same = [result_line(index, [RIGHT], [0.5]) | {"settings": {"questions": "d"}} for index in (0, 1)]
    write(tmp_path / "part0.jsonl", *same)
    write(tmp_path / "part1.jsonl", same[1])
    _, questions = report_files("make10", str(tmp_path / "part*"))
    assert [len(question.correct) for question in questions] == [1, 2]


def test_missing_files_and_candidates_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        result_files(str(tmp_path / "none*"))
    (tmp_path / "out.jsonl.journal").write_text("")
    with pytest.raises(UserError, match="unfinished run"):
        result_files(str(tmp_path / "out.jsonl"))
    with pytest.raises(UserError, match="no candidates"):
        read_lines([write(tmp_path / "empty.jsonl")])
    with pytest.raises(UserError, match="--N 3: only 2 candidates"):
        repeated_best_of_n([question([0.1, 0.2], [0.0, 1.0])], 3)


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


def test_summary_refuses_unlike_runs() -> None:
    base = measure(random_questions(3, 32), settings())
    with pytest.raises(UserError, match=r"differ in temperature \(1.0, 0.7\)"):
        build_summary(base, measure(random_questions(3, 32), settings(temperature=0.7)))
    with pytest.raises(UserError, match="needs N=32, but a question has only 8"):
        build_summary(base, measure(random_questions(3, 8), settings()))


def test_a_report_is_valid_json_even_where_undefined() -> None:
    report = measure([question([0.5, 0.6], [1.0, 1.0])])
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["auc"] is None
    assert values["curves"]["oracle"]["2"] == {"mean": 1.0, "standard_error": None}


def test_tables_show_every_number() -> None:
    base, rl = reports()
    console = Console(width=140, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(accuracy_table({"Before": base, "After": rl}), quality_table({"After": rl}))
    text = console.export_text()
    assert f"{100 * base.curves['best_of_n'][32].mean:.1f}" in text
    assert f"{rl.auc:.3f}" in text


def drawn(path: Path) -> float:
    """Share of pixels that are not white."""
    pixels = image.imread(path)[..., :3]
    return float((pixels < 0.98).any(-1).mean())


def test_figures_are_drawn(tmp_path: Path) -> None:
    base, rl = reports()
    plot_accuracy({"Before RL": base, "After RL": rl}, tmp_path / "accuracy.png")
    plot_step_scores(random_questions(5, 8), tmp_path / "steps.png")
    records = [{"step": i, "reward/pass_rate": i / 40, "score/auc": float("nan") if i == 3 else 0.9} for i in range(40)]
    metrics = write(tmp_path / "metrics.jsonl", *records)
    with metrics.open("a") as stream:
        stream.write('{"step": 40, "rew')
    plot_training(metrics, tmp_path / "training.png")
    for name in ("accuracy", "steps", "training"):
        assert 0.02 < drawn(tmp_path / f"{name}.png") < 0.6


def test_figures_without_data_say_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no step scores"):
        plot_step_scores([], tmp_path / "x.png")
    with pytest.raises(UserError, match="none of the training curves"):
        plot_training(write(tmp_path / "m.jsonl", {"step": 1, "other": 2.0}), tmp_path / "x.png")
    with pytest.raises(UserError, match="no such file"):
        plot_training(tmp_path / "none.jsonl", tmp_path / "x.png")
    (tmp_path / "bad.jsonl").write_text('{"step": \n{"step": 2}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:1"):
        plot_training(tmp_path / "bad.jsonl", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
