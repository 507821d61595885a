"""What was learnt about a model's scores on graded results, and lies beside its head."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xbai.errors import UserError
from xbai.files import write_json

if TYPE_CHECKING:
    from jaxtyping import Float

SPRM_CALIBRATION_FILE = "sprm_calibration.json"
SCORE_MARGIN = 1e-6
"""Scores count as at least so far from 0 and 1, where log-odds are infinite; 0 stands for a response without steps."""


@dataclass(frozen=True)
class CombinedScore:
    """Trajectory score and mean log-prob in one value: a higher one is more likely right, of the same question.

    Attributes:
        log_score, mean_log_prob: coefficient of each, of standard deviations.
        log_score_scale, mean_log_prob_scale: standard deviation of each within questions.
    """

    log_score: float
    mean_log_prob: float
    log_score_scale: float
    mean_log_prob_scale: float

    def __call__(
        self, scores: Float[np.ndarray, "k"], mean_log_probs: Float[np.ndarray, "k"]
    ) -> Float[np.ndarray, "k"]:
        """The value of each response; -inf where one of both is missing, or the score is 0."""
        features = combined_features(scores, mean_log_probs)
        weights = (self.log_score / self.log_score_scale, self.mean_log_prob / self.mean_log_prob_scale)
        return np.where(np.isfinite(features).all(axis=1), np.nan_to_num(features, neginf=0.0) @ weights, -np.inf)


def combined_features(
    scores: Float[np.ndarray, "k"], mean_log_probs: Float[np.ndarray, "k"]
) -> Float[np.ndarray, "k 2"]:
    """Logarithm of the score, and mean log-prob; -inf where there is none (a score of 0 stands for no steps)."""
    log_scores = np.log(scores, out=np.full(len(scores), -np.inf), where=scores > 0)
    return np.stack([log_scores, mean_log_probs], axis=1)


@dataclass(frozen=True)
class ScoreChance:
    """The probability that a response of a trajectory score is right, whatever the question (Platt scaling).

    Attributes:
        slope, intercept: of its log-odds, as a line over those of the score.
    """

    slope: float
    intercept: float

    def __call__(self, score: float) -> float:
        """The probability, between 0 and 1."""
        return 0.5 + 0.5 * math.tanh((self.slope * log_odds(score) + self.intercept) / 2)


def log_odds(score: float) -> float:
    """log(score / (1 - score)), finite (see `SCORE_MARGIN`)."""
    kept = min(max(score, SCORE_MARGIN), 1 - SCORE_MARGIN)
    return math.log(kept) - math.log1p(-kept)


@dataclass(frozen=True)
class Calibration:
    """The contents of `sprm_calibration.json`."""

    identity: str
    """Of the model whose responses and scores it was fitted on."""
    temperature: float
    """At which they were sampled; log-probs of another one are on another scale."""
    questions: str
    """Digest of those that were answered, which are not to be measured with it."""
    combined: CombinedScore
    """Score and log-prob together."""
    chance: ScoreChance
    """What a score says of one response by itself."""

    def write(self, folder: str | Path) -> Path:
        """Write it into a model folder; returns the file."""
        path = Path(folder) / SPRM_CALIBRATION_FILE
        write_json(asdict(self), path)
        return path

    @classmethod
    def read(cls, path: str | Path) -> Calibration:
        """Read the file, given itself or by its folder.

        Raises:
            UserError: there is none, or it is damaged.
        """
        path = Path(path)
        path = path / SPRM_CALIBRATION_FILE if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"{path}: no such file; xbai calibrate RESULTS --model_path MODEL writes it")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            parts = {"combined": CombinedScore(**value["combined"]), "chance": ScoreChance(**value["chance"])}
            return cls(**{**value, **parts})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a calibration ({error!r}); write it anew by xbai calibrate") from error
