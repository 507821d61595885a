"""Short right answers are worth more, long wrong ones less."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def length_reward(lengths: Tensor, correct: Tensor, prompts: np.ndarray) -> Tensor:
    """[B] between -0.5 and 0.5: how short a response is among those to its prompt (Kimi k1.5, arXiv 2501.12599).

    A response as short as the shortest to its prompt gets 0.5, one as long as the longest -0.5, and the others in
    proportion; wrong ones no more than 0. All get 0 where their lengths are equal.

    Args:
        lengths: [B] tokens.
        correct: [B] 1 for a right response, 0 for a wrong one.
        prompts: [B] names of the prompts.
    """
    names, rows = np.unique(prompts, return_inverse=True)
    group, lengths = torch.from_numpy(rows), lengths.float()
    shortest, longest = (
        torch.zeros(len(names)).scatter_reduce(0, group, lengths, how, include_self=False)[group]
        for how in ("amin", "amax")
    )
    spread = longest - shortest
    value = torch.where(spread > 0, 0.5 - (lengths - shortest) / spread.clamp(min=1), 0.0)
    return torch.where(correct > 0, value, value.clamp(max=0.0))
