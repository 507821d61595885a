"""How well a value tells right from wrong."""

import numpy as np


def roc_auc(values: np.ndarray, correct: np.ndarray) -> float:
    """Area under the ROC curve of `values` [n] against `correct` [n]: the chance that a right one has a higher value.

    Those above 0.5 are right. Ties count half; nan with one class.
    """
    right = correct > 0.5
    positives, negatives = int(right.sum()), int((~right).sum())
    if positives == 0 or negatives == 0:
        return float("nan")
    _, rank_of, tied = np.unique(values, return_inverse=True, return_counts=True, equal_nan=False)
    mean_rank = tied.cumsum() - (tied - 1) / 2
    rank_sum = mean_rank[rank_of][right].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))
