"""Logistic regression by Newton's method."""

from __future__ import annotations

import numpy as np

MAX_STEPS = 100
TOLERANCE = 1e-10


def fit_logistic(rows: np.ndarray, weights: np.ndarray, precision: float) -> np.ndarray:
    """argmin_w sum(weights * log(1 + exp(-rows w))) + precision / 2 |w|^2.

    The loss is strictly convex: the same data always give the same fit.

    Args:
        rows: [rows, features] features where the outcome is 1, and less the features where it is 0.
        weights: [rows].
        precision: of each coefficient's normal prior around 0, above 0: it keeps separable data finite.

    Returns:
        [features] coefficients.
    """

    def loss(coefficients: np.ndarray) -> float:
        penalty = precision / 2 * coefficients @ coefficients
        return float(weights @ np.logaddexp(0.0, -rows @ coefficients) + penalty)

    coefficients = np.zeros(rows.shape[1])
    for _ in range(MAX_STEPS):
        miss = 0.5 - 0.5 * np.tanh(rows @ coefficients / 2)  # sigmoid(-rows w), without overflow
        gradient = precision * coefficients - rows.T @ (weights * miss)
        curvature = precision * np.eye(len(gradient)) + (rows.T * (weights * miss * (1 - miss))) @ rows
        step = np.linalg.solve(curvature, gradient)
        if gradient @ step < TOLERANCE:
            break
        while loss(coefficients - step) > loss(coefficients) - 0.25 * gradient @ step:
            step = step / 2
        coefficients = coefficients - step
    return coefficients
