"""`xbai calibrate`: learn on graded results how score and log-prob are best put together."""

from __future__ import annotations

import logging
from pathlib import Path

from xbai.calibration import SPRM_CALIBRATION_FILE, Calibration
from xbai.engine.files import check_model_folder
from xbai.errors import UserError
from xbai.files import check_writable
from xbai.measure.combined_fit import CombinedFit, fit_combined
from xbai.measure.graded import grade_lines
from xbai.measure.options import CalibrateOptions
from xbai.measure.result_set import read_lines, result_files
from xbai.measure.tables import Grid, fraction, show
from xbai.model_identity import model_identity
from xbai.results.settings import settings_made_by

logger = logging.getLogger(__name__)

FEATURE_NAMES = {
    "log_score": "logarithm of the score",
    "mean_log_prob": "mean log-prob",
    "combined": "both, fitted on other questions",
}


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
    try:
        fit = fit_combined(grade_lines(options.task, lines))
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    path = Calibration(identity, settings["temperature"], settings["questions"], fit.combined).write(options.model_path)
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
