"""What a step's label could be: losses that the laboratory (score_lab.py) tries and the trainer does not have.

The published label of a step is the outcome of its response, so that the steps before a mistake count as wrong. The
responses to a prompt say more: many begin with the same steps, and how those end is what a step is worth.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from verl.utils.dataset.step_dataset import StepBatch
from xbai.benchmarks.story_kinds import OPERATIONS
from xbai.measure.feature_files import encode_response, step_states
from xbai.measure.graded_responses import read_graded_responses
from xbai.model_folder import load_tokenizer
from xbai.sprm import ScoreObjective, StepRule
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
    return _mean_bce(logits, state_rates(batch), _graded_steps(batch))


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


@dataclass(frozen=True)
class TrueLabels:
    """BCE against what is known of each step: that no equation up to it is false. Nobody has that outside a benchmark.

    Attributes:
        sound: by state.
    """

    sound: Mapping[int, bool]

    @classmethod
    def of_stories(cls, results: Path, model_path: str, rule: StepRule) -> TrueLabels:
        """Read the equations in the responses of a result file, at the steps of a rule."""
        tokenizer = load_tokenizer(model_path)
        sound: dict[int, bool] = {}
        for response in read_graded_responses(results, "stories"):
            encoded = encode_response(tokenizer, rule, response)
            for state, position in zip(step_states(encoded), encoded.positions, strict=True):
                sound[state] = equations_hold(tokenizer.decode(encoded.ids[encoded.start : position + 1]))
        return cls(sound)

    def __call__(self, logits: Tensor, batch: StepBatch) -> Tensor:
        """The loss of a batch."""
        labels = batch.rows(torch.tensor([float(self.sound[state]) for state in batch.states.tolist()]))
        return _mean_bce(logits, labels, batch.mask)


def equations_hold(text: str) -> bool:
    """Whether all equations such as `3 + 4 = 7` in a text are true."""
    found = re.findall(r"(\d+) ([-+x/]) (\d+) = (\d+)", text)
    return all(
        (sign != "/" or int(right)) and OPERATIONS[sign](int(left), int(right)) == int(result)
        for left, sign, right, result in found
    )


def _graded_steps(batch: StepBatch) -> Tensor:
    return batch.mask & batch.graded[:, None]


def _mean_bce(logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (losses * counted).sum() / counted.sum().clamp(min=1)


def _step_loss(logits: Tensor, batch: StepBatch, counted: Tensor) -> Tensor:
    counts = StepCounts(*count_by_class(counted, batch.labels).tolist())
    return sprm_loss(logits, counted, batch.labels, counts)
