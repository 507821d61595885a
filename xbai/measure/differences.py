"""How much better one way of choosing is than another on the same candidates, paired by question."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from xbai.measure.estimate import Curves, Estimate

BASELINES = {
    "best_of_n": ("majority", "best_of_n_log_prob", "random"),
    "best_of_n_combined": ("best_of_n", "majority", "best_of_n_log_prob", "random"),
}
"""What a choice by the score is held against: what is free, and the score without log-prob."""

REFERENCE_N = 8
"""A choice that finds the errors of its score gets worse with more candidates than these."""


def paired_differences(found: Mapping[str, Mapping[int, np.ndarray]]) -> Curves:
    """`one - other` at each N above 1, and `one - one at 8` above 8; differences of what was not measured are left out.

    Args:
        found: accuracy [questions] of each strategy at each N.
    """
    curves: Curves = {}
    for name, baselines in BASELINES.items():
        ours = found.get(name, {})
        for baseline in filter(found.__contains__, baselines):
            theirs = found[baseline]
            curves[f"{name} - {baseline}"] = {n: Estimate.over(ours[n] - theirs[n]) for n in ours if n > 1}
        if REFERENCE_N in ours:
            at_reference = ours[REFERENCE_N]
            curves[f"{name} - {name} at {REFERENCE_N}"] = {
                n: Estimate.over(ours[n] - at_reference) for n in ours if n > REFERENCE_N
            }
    return {name: curve for name, curve in curves.items() if curve}
