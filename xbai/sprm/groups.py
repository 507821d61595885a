"""Does the score choose well among the responses to one prompt? The question that Best-of-N asks, and AUC does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from xbai.sprm.loss import auc

if TYPE_CHECKING:
    from jaxtyping import Float, Int64, Shaped

Prompts: TypeAlias = 'Sequence[str] | Sequence[int] | Shaped[np.ndarray, "n"]'
"""[n] equal for responses to the same prompt."""


def within_prompt_auc(scores: Float[Tensor, "n"], labels: Shaped[Tensor, "n"], prompts: Prompts) -> float:
    """`auc` of the responses to each prompt that has right and wrong ones, averaged over these prompts; nan without.

    An AUC over all responses rewards a head that knows which questions are easy, which chooses nothing.
    """
    values = [auc(scores[rows], labels[rows]) for rows in _groups(prompts)]
    return _mean([value for value in values if not np.isnan(value)])


def best_of_n_gain(scores: Float[Tensor, "n"], labels: Shaped[Tensor, "n"], prompts: Prompts) -> float:
    """How much more often the response with its prompt's highest score is right than any response to it.

    Of tied responses each is chosen as often. The mean over prompts; nan without.
    """
    gains = []
    for rows in _groups(prompts):
        right = (labels[rows] > 0.5).double()
        gains.append(float(right[scores[rows] == scores[rows].max()].mean() - right.mean()))
    return _mean(gains)


def _groups(prompts: Prompts) -> Iterator[Int64[Tensor, "_"]]:
    _, group_of = np.unique(np.asarray(prompts), return_inverse=True)
    order = torch.from_numpy(group_of.argsort(kind="stable"))
    return iter(order.split(np.bincount(group_of).tolist())) if len(order) else iter(())


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
