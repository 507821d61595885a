"""Score and log-prob together: what is fitted, for whom, and how it is used."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from xbai.calibration import SPRM_CALIBRATION_FILE, Calibration, CombinedScore, ScoreChance
from xbai.cli import app
from xbai.errors import UserError
from xbai.measure.calibrate import PRIOR_PRECISION, fit_combined, run_calibrate
from xbai.measure.graded import GradedQuestion
from xbai.measure.metric_command import run_metric
from xbai.measure.metrics import measure
from xbai.measure.options import CalibrateOptions, MetricOptions, SummaryOptions
from xbai.measure.summary import run_summary
from xbai.model_files import ModelFiles
from xbai.model_identity import model_identity

RIGHT, WRONG = "The answer is \\boxed{7+8-1+1-5}.", "The answer is \\boxed{7+8+1+1+5}."


def sampled_questions(count: int = 40, samples: int = 16, seed: int = 0) -> list[GradedQuestion]:
    """Both signals tell right from wrong by noises of their own; a question's ease moves both, and the share right."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        ease = rng.normal()
        correct = (rng.random(samples) < 1 / (1 + math.exp(-ease))).astype(float)
        logits = 2.0 * ease + 1.0 * correct + rng.normal(size=samples)
        made.append(
            GradedQuestion(
                key=(number, f"q{number}"),
                scores=1 / (1 + np.exp(-logits)),
                correct=correct,
                keys=[None] * samples,
                step_scores=[None] * samples,
                token_counts=[10] * samples,
                finish_reasons=["stop"] * samples,
                mean_log_probs=-2 + 0.3 * ease + 0.15 * correct + 0.1 * rng.normal(size=samples),
            )
        )
    return made


@pytest.fixture(scope="module")
def questions() -> list[GradedQuestion]:
    return sampled_questions()


def test_the_fit_is_the_minimum_of_the_loss_it_describes(questions: list[GradedQuestion]) -> None:
    found = fit_combined(questions).combined
    rights_and_wrongs, deviations = [], []
    for question in questions:
        if 0 < question.correct.sum() < len(question.correct):
            features = np.stack([np.log(question.scores), question.mean_log_probs], 1)
            deviations.append(features - features.mean(0))
            right = question.correct == 1
            rights_and_wrongs.append((torch.from_numpy(features[right]), torch.from_numpy(features[~right])))
    scales = np.concatenate(deviations).std(0)
    assert (found.log_score_scale, found.mean_log_prob_scale) == pytest.approx(tuple(scales))
    coefficients = torch.tensor([found.log_score, found.mean_log_prob], dtype=torch.float64, requires_grad=True)
    loss = PRIOR_PRECISION / 2 * (coefficients**2).sum()
    for right, wrong in rights_and_wrongs:
        values = (each / torch.from_numpy(scales) @ coefficients for each in (right, wrong))
        ours, theirs = values
        loss = loss - torch.nn.functional.logsigmoid(ours[:, None] - theirs[None]).mean()
    loss.backward()
    assert coefficients.grad.abs().max() < 1e-4
    assert found.log_score > 0.3 and found.mean_log_prob > 0.3


def test_a_questions_difficulty_drops_out(questions: list[GradedQuestion]) -> None:
    moved = [
        replace(question, scores=question.scores * 0.9**number, mean_log_probs=question.mean_log_probs - number)
        for number, question in enumerate(questions)
    ]
    one, other = (fit_combined(each).combined for each in (questions, moved))
    assert vars(other) == pytest.approx(vars(one), rel=1e-6)


def test_both_are_better_than_each_on_questions_the_fit_did_not_see(questions: list[GradedQuestion]) -> None:
    fit = fit_combined(questions)
    assert fit.within_prompt_auc["combined"].mean > max(
        fit.within_prompt_auc["log_score"].mean, fit.within_prompt_auc["mean_log_prob"].mean
    )
    fresh = [
        replace(question, combined=fit.combined(question.scores, question.mean_log_probs))
        for question in sampled_questions(seed=1)
    ]
    report = measure(fresh)
    assert report.curves["best_of_n_combined"][8].mean > report.curves["best_of_n"][8].mean
    assert report.signals["best_of_n_combined"].within_prompt_auc.mean == pytest.approx(
        fit.within_prompt_auc["combined"].mean, abs=0.05
    )
    difference = report.differences["best_of_n_combined - best_of_n"][8]
    assert difference.mean == pytest.approx(
        report.curves["best_of_n_combined"][8].mean - report.curves["best_of_n"][8].mean
    )


def test_a_useless_signal_gets_no_weight_and_cannot_flatter_itself() -> None:
    rng = np.random.default_rng(5)
    noise = [replace(q, mean_log_probs=rng.normal(size=16), scores=rng.random(16)) for q in sampled_questions()]
    fit = fit_combined(noise)
    error = fit.within_prompt_auc["combined"].standard_error
    assert abs(fit.within_prompt_auc["combined"].mean - 0.5) < 3 * error
    constant = [replace(question, mean_log_probs=np.full(16, -1.0)) for question in sampled_questions()]
    assert fit_combined(constant).combined.mean_log_prob == 0.0


def test_separable_responses_have_finite_coefficients() -> None:
    clear = [replace(q, scores=np.where(q.correct == 1, 0.9, 0.1)) for q in sampled_questions()]
    combined = fit_combined(clear).combined
    assert 0 < combined.log_score < 100


def test_what_lacks_one_of_them_comes_last_and_teaches_nothing(questions: list[GradedQuestion]) -> None:
    combined = CombinedScore(1.0, 2.0, 0.5, 0.1)
    values = combined(np.array([0.5, -np.inf, 0.0, 0.5]), np.array([-0.3, -0.1, -0.1, -np.inf]))
    assert values == pytest.approx([math.log(0.5) / 0.5 - 0.3 * 2 / 0.1, -np.inf, -np.inf, -np.inf])
    more = [
        replace(
            question,
            scores=np.append(question.scores, -np.inf),
            mean_log_probs=np.append(question.mean_log_probs, 100.0),
            correct=np.append(question.correct, 0.0),
        )
        for question in questions
    ]
    assert fit_combined(more) == fit_combined(questions)


def model_folder(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"dtype": "float32"}', encoding="utf-8")
    (path / "score_module.pt").write_bytes(b"weights of " + path.name.encode())
    return path


def write_results(path: Path, identity: str, count: int = 6, **changes: object) -> Path:
    """The third of each question's responses is right; score and log-prob are each wrong about another question."""
    settings = {"task": "make10", "temperature": 0.7, "questions": "d", "policy": identity, "scorer": identity}
    with path.open("w", encoding="utf-8") as stream:
        for index in range(count):
            scores, log_probs = [0.4, 0.5, 0.6, 0.3], [-0.4, -0.3, -0.2, -0.5]
            (scores if index % 3 == 0 else log_probs)[2] -= 0.15
            output = {
                "solution_lst": ["P" + text for text in (WRONG, WRONG + " ", RIGHT, WRONG + "  ")],
                "score_lst": scores,
                "sample_lst": list(range(4)),
                "mean_log_prob_lst": log_probs,
                "token_count_lst": [5] * 4,
                **(changes.get("output") or {}),
            }
            line = {"prompt": "P", "answer": "7 8 1 1 5", "output": output, "index": index, "meta": {}}
            stream.write(json.dumps({**line, "settings": settings | (changes.get("settings") or {})}) + "\n")
    return path


def test_the_commands_fit_write_and_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    model = model_folder(tmp_path / "model")
    identity = model_identity(model)
    validation = write_results(tmp_path / "validation.jsonl", identity, settings={"questions": "validation"})
    run_calibrate(CalibrateOptions((str(validation),), "make10", str(model)))
    shown = capsys.readouterr().out
    assert "mean log-prob" in shown and "AUC within a question" in shown and "expected calibration error" in shown
    assert model_identity(model) == identity, "a calibration does not make another model of it"
    calibration = Calibration.read(model)
    assert (calibration.identity, calibration.temperature, calibration.questions) == (identity, 0.7, "validation")
    assert calibration == Calibration.read(model / SPRM_CALIBRATION_FILE)
    assert calibration.chance(0.3) < calibration.chance(0.6)
    assert SPRM_CALIBRATION_FILE not in ModelFiles.read(model).contents, "another model would inherit it"

    results = write_results(tmp_path / "test.jsonl", identity)
    run_metric(MetricOptions("make10", [str(results)], json_path=tmp_path / "m.json", calibration=model))
    values = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    assert values["curves"]["best_of_n_combined"]["4"]["mean"] == 1.0
    assert values["curves"]["best_of_n"]["4"]["mean"] == pytest.approx(2 / 3)
    assert values["curves"]["best_of_n_log_prob"]["4"]["mean"] == pytest.approx(1 / 3)
    assert values["differences"]["best_of_n_combined - best_of_n"]["4"]["mean"] == pytest.approx(1 / 3)
    assert "flatters" not in caplog.text
    run_metric(MetricOptions("make10", [str(validation)], json_path=tmp_path / "m.json", calibration=model))
    assert "the calibration was fitted on these questions" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"scorer": "other:1"}}, "the scores are by the model other:1"),
        ({"settings": {"policy": None}}, "does not say which model made the responses"),
        ({"settings": {"temperature": 1.0}}, "sampled at temperature 1.0, but the calibration is for 0.7"),
        ({"output": {"mean_log_prob_lst": None}}, "--calibration needs scores and log-probs of all responses"),
    ],
)
def test_a_calibration_of_another_model_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    model = model_folder(tmp_path / "model")
    Calibration(model_identity(model), 0.7, "v", CombinedScore(1.0, 1.0, 1.0, 1.0), ScoreChance(1.0, 0.0)).write(model)
    results = write_results(tmp_path / "out.jsonl", model_identity(model), **changes)
    with pytest.raises(UserError, match=message) as caught:
        run_metric(MetricOptions("make10", [str(results)], calibration=model))
    assert str(results) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": {"mean_log_prob_lst": None}}, "no response has log-probs"),
        ({"output": {"score_lst": None}}, "no response has scores"),
        ({"output": {"solution_lst": ["P" + WRONG] * 4}}, "no question has right and wrong responses"),
        ({"output": {"score_lst": [0.5, 0.6, 0.1, 0.4]}}, "the higher a response's score, the less likely it is right"),
        ({"settings": {"scorer": None}}, "does not say which model made the scores"),
        ({"settings": {"policy": "other:1"}}, "the responses are by the model other:1"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(tmp_path: Path, changes: dict, message: str) -> None:
    model = model_folder(tmp_path / "model")
    results = write_results(tmp_path / "out.jsonl", model_identity(model), **changes)
    shown = CliRunner().invoke(app, ["calibrate", str(results), "--task", "make10", "--model_path", str(model)])
    assert shown.exit_code == 2
    assert shown.stderr.startswith(f"error: {results}: ") and shown.stderr.count("\n") == 1
    assert message in shown.stderr
    assert not (model / SPRM_CALIBRATION_FILE).exists()


def test_calibrations_that_are_none_are_one_line(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    with pytest.raises(UserError, match=r"sprm_calibration\.json: no such file; xbai calibrate"):
        Calibration.read(model)
    combined = {"log_score": 1, "mean_log_prob": 1, "log_score_scale": 1, "mean_log_prob_scale": 1}
    without_chance = {"identity": "m:1", "temperature": 1, "questions": "", "combined": combined}
    for content in (
        "{",
        "[]",
        '{"identity": "m:1"}',
        json.dumps(without_chance),
        json.dumps(without_chance | {"x": 1}),
    ):
        (model / SPRM_CALIBRATION_FILE).write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match="not a calibration"):
            Calibration.read(model)


def test_the_summary_chooses_by_both_where_there_is_a_calibration(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    identity = model_identity(model)
    Calibration(identity, 0.7, "v", CombinedScore(1.0, 1.0, 1.0, 1.0), ScoreChance(1.0, 0.0)).write(model)
    many = {
        "solution_lst": ["P" + RIGHT + " " * (i % 4) if i % 3 else "P" + WRONG for i in range(32)],
        "score_lst": [0.3 + 0.01 * i for i in range(32)],
        "sample_lst": list(range(32)),
        "mean_log_prob_lst": [-0.1 * (i % 5) for i in range(32)],
        "token_count_lst": [9] * 32,
    }
    paths = [
        write_results(tmp_path / name, identity, 3, output=many, settings=settings)
        for name, settings in (("base", {"policy": "b:1", "scorer": "b:1"}), ("rl", {}), ("held", {"questions": "h"}))
    ]
    setting = tmp_path / "setting.json"
    setting.write_text('{"loss": "step_bce"}', encoding="utf-8")
    base, rl, held = map(str, paths)
    options = SummaryOptions(
        "make10", base, rl, tmp_path / "s.json", held, calibration=model, score_setting=setting, seconds_total=1.0
    )
    run_summary(options)
    summary = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert summary["score_setting"] == {"loss": "step_bce"}
    for part in (summary, summary["held_out"]):
        assert set(part["best_of_n_combined"]) == {"2", "8", "32"}
        assert "best_of_n_combined - best_of_n_combined at 8" in part["differences"]
    assert "best_of_n_combined" not in summary["base_model"]
    setting.write_text("[1]", encoding="utf-8")
    with pytest.raises(UserError, match=r"--score_setting .*: holds no JSON object, but list"):
        run_summary(options)
    with pytest.raises(UserError, match="give --held_out too"):
        run_summary(replace(options, held_out=None, held_out_base=base))
