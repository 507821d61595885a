"""What a step's label could be: losses that the laboratory (score_lab.py) tries and the trainer does not have.

The published label of a step is the outcome of its response, so that the steps before a mistake count as wrong. The
responses to a prompt say more: many begin with the same steps, and how those end is what a step is worth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from verl.utils.dataset.step_dataset import StepBatch
from xbai.sprm import ScoreObjective
from xbai.sprm.loss import StepCounts, count_by_class, sprm_loss

Loss = Callable[[Tensor, StepBatch], Tensor]
"""Of step logits [B, T]."""


def trained_loss(objective: ScoreObjective) -> Loss:
    """One that the trainer has too."""
    return lambda logits, batch: objective(logits, batch.mask, batch.labels, batch.graded, batch.groups.tolist())


def state_rates(batch: StepBatch) -> Tensor:
    """[B, T] of each step the share of right responses among the graded ones that went through it; 0 off the mask."""
    responses = torch.arange(len(batch.labels))[:, None].expand_as(batch.mask)[batch.mask]
    _, state = torch.unique(batch.states, return_inverse=True)
    graded = batch.graded[responses].float()
    through = torch.zeros(len(state)).index_add(0, state, graded)
    right = torch.zeros(len(state)).index_add(0, state, graded * batch.labels[responses])
    return batch.rows((right / through.clamp(min=1))[state])


def soft_labels(logits: Tensor, batch: StepBatch) -> Tensor:
    """BCE against `state_rates`: a Monte Carlo estimate of the value of a step."""
    counted = _graded_steps(batch)
    losses = F.binary_cross_entropy_with_logits(logits, state_rates(batch), reduction="none")
    return (losses * counted).sum() / counted.sum().clamp(min=1)


def late_labels(logits: Tensor, batch: StepBatch) -> Tensor:
    """The step loss; of a wrong response only the steps from where no right one to the same prompt went with it."""
    wrong = (batch.labels < 0.5)[:, None]
    return _step_loss(logits, batch, _graded_steps(batch) & ~(wrong & (state_rates(batch) > 0)))


@dataclass(frozen=True)
class AgreementWithin:
    """The step loss of the steps where the head agrees with the outcome, or disagrees by less than a margin.

    Attributes:
        margin: in log-odds; 0 is the published weighting.
    """

    margin: float

    def __call__(self, logits: Tensor, batch: StepBatch) -> Tensor:
        """The loss of a batch."""
        agreement = torch.where((batch.labels > 0.5)[:, None], logits, -logits).detach()
        return _step_loss(logits, batch, _graded_steps(batch) & (agreement > -self.margin))


def _graded_steps(batch: StepBatch) -> Tensor:
    return batch.mask & batch.graded[:, None]


def _step_loss(logits: Tensor, batch: StepBatch, counted: Tensor) -> Tensor:
    counts = StepCounts(*count_by_class(counted, batch.labels).tolist())
    return sprm_loss(logits, counted, batch.labels, counts)
