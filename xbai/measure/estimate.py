"""A measured mean and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its standard error (nan with one question)."""

    mean: float
    standard_error: float

    @classmethod
    def over(cls, values: Sequence[float] | np.ndarray) -> Estimate:
        """The mean of one value a question; nan of none."""
        array = np.asarray(values, dtype=np.float64)
        if not len(array):
            return cls(float("nan"), float("nan"))
        error = array.std(ddof=1) / np.sqrt(len(array)) if len(array) > 1 else np.nan
        return cls(float(array.mean()), float(error))


Curves = dict[str, dict[int, Estimate]]
"""By strategy, or difference of two, and N."""
