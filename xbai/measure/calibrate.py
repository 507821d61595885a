"""`xbai calibrate`: how score and log-prob are weighed against each other, and which chance a score stands for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xbai.calibration import SPRM_CALIBRATION_FILE, Calibration, CombinedScore, ScoreChance, combined_features
from xbai.errors import UserError
from xbai.files import check_writable
from xbai.measure.chance_fit import fit_chance, held_out_chances
from xbai.measure.estimators import Estimate
from xbai.measure.graded import GradedQuestion, grade_lines
from xbai.measure.logistic import fit_logistic
from xbai.measure.options import CalibrateOptions
from xbai.measure.result_set import read_lines, result_files
from xbai.measure.separation import expected_calibration_error, reliability, separation
from xbai.measure.tables import Grid, fraction, show
from xbai.model_folder import check_model_folder
from xbai.model_identity import model_identity
from xbai.results.settings import settings_made_by

logger = logging.getLogger(__name__)

FOLDS = 10
PRIOR_PRECISION = 1.0
"""Of each coefficient of the combined score, in the unit of one question."""

FEATURE_NAMES = {
    "log_score": "logarithm of the score",
    "mean_log_prob": "mean log-prob",
    "combined": "both, fitted on other questions",
}


@dataclass(frozen=True)
class CombinedFit:
    """A fit, and what choosing by it can be expected to bring.

    Attributes:
        combined: fitted on all questions.
        questions: how many have right and wrong responses, which is what a fit learns from.
        within_prompt_auc: of `log_score` and `mean_log_prob` alone, and of `combined`, each response judged by a fit on
            other questions.
    """

    combined: CombinedScore
    questions: int
    within_prompt_auc: dict[str, Estimate]


def run_calibrate(options: CalibrateOptions) -> None:
    """Fit on result files and write the calibration into the model's folder.

    Raises:
        UserError: no such folder or files, results of another model, or without scores or log-probs.
    """
    check_model_folder(options.model_path)
    check_writable(Path(options.model_path) / SPRM_CALIBRATION_FILE)
    identity, place = model_identity(options.model_path), " ".join(options.results)
    lines = read_lines(result_files(options.results, "RESULTS"), options.task)
    found = next((line.settings for line in lines if line.settings is not None), None)
    settings = settings_made_by(found, identity, place)
    questions = grade_lines(options.task, lines)
    try:
        fit = fit_combined(questions)
        chance = fit_chance(*_scores_and_grades(questions))
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    calibration = Calibration(identity, settings["temperature"], settings["questions"], fit.combined, chance)
    path = calibration.write(options.model_path)
    show([fit_grid(fit), chance_grid(chance, questions)])
    logger.info("wrote %s", path)


def fit_grid(fit: CombinedFit) -> Grid:
    """Coefficients and AUCs."""
    coefficients = {"log_score": fit.combined.log_score, "mean_log_prob": fit.combined.mean_log_prob}
    rows = [
        [title, f"{coefficients[name]:.3f}" if name in coefficients else "", fraction(fit.within_prompt_auc[name])]
        for name, title in FEATURE_NAMES.items()
    ]
    header = ["", "coefficient (a standard deviation)", "AUC within a question"]
    return Grid(f"Right against wrong responses to the same question, {fit.questions:,} questions", header, [rows], 1)


def chance_grid(chance: ScoreChance, questions: Sequence[GradedQuestion]) -> Grid:
    """Coefficients, and the calibration error before and after; each response judged by a fit on other questions."""
    scores, correct = _scores_and_grades(questions)
    rows = [
        ["score", "", "", fraction(_calibration_error(scores, correct))],
        [
            "chance, fitted on other questions",
            f"{chance.slope:.3f}",
            f"{chance.intercept:.3f}",
            fraction(_calibration_error(held_out_chances(scores, correct, FOLDS), correct)),
        ],
    ]
    header = ["", "slope (of log-odds)", "intercept", "expected calibration error"]
    return Grid("How far a score is the chance that a response is right", header, [rows], 1)


def _calibration_error(values: Sequence[np.ndarray], correct: Sequence[np.ndarray]) -> Estimate:
    known = [np.isfinite(value) & ~np.isnan(grade) for value, grade in zip(values, correct, strict=True)]
    columns = [
        (value[of], grade[of], np.full(of.sum(), number))
        for number, (value, grade, of) in enumerate(zip(values, correct, known, strict=True))
    ]
    curve = reliability(*map(np.concatenate, zip(*columns, strict=True)))
    return Estimate(expected_calibration_error(curve), float("nan"))


def _scores_and_grades(questions: Sequence[GradedQuestion]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return [question.scores for question in questions], [question.correct for question in questions]


@dataclass(frozen=True)
class _Contrasts:
    """What one question teaches.

    Attributes:
        differences: [right x wrong, 2] features of each right response less those of each wrong one.
        deviations: [responses, 2] features less their mean over the question.
    """

    differences: np.ndarray
    deviations: np.ndarray


def fit_combined(questions: Sequence[GradedQuestion]) -> CombinedFit:
    """Conditional logistic regression of right against wrong responses to the same question.

    A question's share of the loss is the mean over its pairs of -log sigmoid(w (right - wrong)): its difficulty drops
    out, as in a matched case-control study, and no question counts more than another. Features are divided by their
    standard deviation within questions; coefficients have a normal prior.

    Raises:
        UserError: no scores or no log-probs, or no question that has right and wrong responses with both.
    """
    for values, missing in (
        ([question.scores for question in questions], "scores"),
        ([question.mean_log_probs for question in questions], "log-probs"),
    ):
        if not any(np.isfinite(value).any() for value in values):
            raise UserError(f"no response has {missing}; run inference again on a policy service that returns both")
    taught = [_contrasts(question) for question in questions]
    teaching = [contrasts for contrasts in taught if contrasts is not None]
    if not teaching:
        raise UserError("no question has right and wrong responses with scores and log-probs: nothing to learn from")
    known = [_known_features(question) for question in questions]
    return CombinedFit(
        _fit(teaching),
        len(teaching),
        {
            "log_score": _within(questions, [features[:, 0] for features in known]),
            "mean_log_prob": _within(questions, [features[:, 1] for features in known]),
            "combined": _within(questions, _held_out_values(questions, taught)),
        },
    )


def _known_features(question: GradedQuestion) -> np.ndarray:
    """[K, 2], nan for a response that lacks one of them: all three AUCs are of the same responses."""
    features = combined_features(question.scores, question.mean_log_probs)
    return np.where(np.isfinite(features).all(axis=1, keepdims=True), features, np.nan)


def _contrasts(question: GradedQuestion) -> _Contrasts | None:
    features = _known_features(question)
    known = ~np.isnan(features[:, 0]) & ~np.isnan(question.correct)
    features, right = features[known], question.correct[known] > 0.5
    if right.all() or not right.any():
        return None
    differences = (features[right][:, None] - features[~right][None]).reshape(-1, features.shape[1])
    return _Contrasts(differences, features - features.mean(axis=0))


def _fit(teaching: Sequence[_Contrasts]) -> CombinedScore:
    deviations = np.concatenate([contrasts.deviations for contrasts in teaching])
    scales = deviations.std(axis=0)
    scales[scales == 0] = 1.0  # A feature that never differs: its coefficient stays 0.
    pairs = np.concatenate([contrasts.differences for contrasts in teaching]) / scales
    weights = np.concatenate([np.full(len(each.differences), 1 / len(each.differences)) for each in teaching])
    coefficients = fit_logistic(pairs, weights, PRIOR_PRECISION)
    return CombinedScore(*map(float, (*coefficients, *scales)))


def _held_out_values(questions: Sequence[GradedQuestion], taught: Sequence[_Contrasts | None]) -> list[np.ndarray]:
    """Each question's combined scores by a fit on the other folds; nan where those teach nothing."""
    values = [np.full(len(question.scores), np.nan) for question in questions]
    for fold in range(FOLDS):
        others = [each for number, each in enumerate(taught) if number % FOLDS != fold and each is not None]
        if others:
            fit = _fit(others)
            for number in range(fold, len(questions), FOLDS):
                values[number] = fit(questions[number].scores, questions[number].mean_log_probs)
    return values


def _within(questions: Sequence[GradedQuestion], values: Sequence[np.ndarray]) -> Estimate:
    return separation(values, [question.correct for question in questions]).within_prompt_auc
