"""Best-of-N: the candidate with the highest trajectory score."""

from __future__ import annotations

import math

import numpy as np


def sortable_scores(scores: list[float | None]) -> np.ndarray:
    """Scores [n] as float64; a candidate without a score comes last, as -inf."""
    return np.array([-math.inf if score is None else score for score in scores], dtype=np.float64)


def best_candidate(scores: list[float | None]) -> int:
    """Index of the highest score, the first of equals."""
    return int(np.argmax(sortable_scores(scores)))
