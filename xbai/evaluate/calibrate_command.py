"""`xbai calibrate`: learn on graded results how score and log-prob are best put together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from xbai.engine.files import check_model_folder
from xbai.errors import UserError
from xbai.evaluate.combined_fit import CombinedFit, fit_combined
from xbai.evaluate.graded import grade_lines
from xbai.evaluate.result_set import read_lines, result_files
from xbai.evaluate.settings import check_made_by
from xbai.evaluate.tables import Grid, fraction, show
from xbai.files import check_writable
from xbai.model_identity import model_identity
from xbai.sprm.calibration import SPRM_CALIBRATION_FILE, Calibration

logger = logging.getLogger(__name__)

FEATURE_NAMES = {
    "log_score": "logarithm of the score",
    "mean_log_prob": "mean log-prob",
    "combined": "both, fitted on other questions",
}


def run_calibrate(task: str, patterns: Sequence[str], model_path: str) -> None:
    """Fit on result files and write the calibration into the model's folder.

    Raises:
        UserError: no such folder or files, results of another model, or without scores or log-probs.
    """
    check_model_folder(model_path)
    check_writable(Path(model_path) / SPRM_CALIBRATION_FILE)
    identity, place = model_identity(model_path), " ".join(patterns)
    lines = read_lines(result_files(patterns, "RESULTS"), task)
    settings = next((line.settings for line in lines if line.settings is not None), None)
    check_made_by(settings, identity, place)
    try:
        fit = fit_combined(grade_lines(task, lines))
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    path = Calibration(identity, settings["temperature"], settings["questions"], fit.combined).write(model_path)
    show([fit_grid(fit)])
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
