"""Steps of graded responses from files of features, in batches of whole groups: all responses to some prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from xbai.sprm.step_features import StepFeatures


@dataclass(frozen=True)
class StepBatch:
    """B responses with at most T steps each, K in all.

    Attributes:
        features: [K, c] float32.
        mask: [B, T] bool, True at the steps; row by row they are those of `features`.
        labels: [B] float32, 1.0 for a right answer.
        graded: [B] bool.
        groups: [B] int64, equal for responses to the same prompt.
        states: [K] int64, see `StepFeatures`.
    """

    features: Tensor
    mask: Tensor
    labels: Tensor
    graded: Tensor
    groups: Tensor
    states: Tensor

    def to(self, device: torch.device) -> StepBatch:
        """The same on another device."""
        return StepBatch(*(getattr(self, field.name).to(device) for field in fields(self)))

    def rows(self, steps: Tensor) -> Tensor:
        """From a value of each step [K] to rows [B, T] of them; 0 off the mask."""
        return steps.new_zeros(self.mask.shape).masked_scatter(self.mask, steps)


class StepDataset:
    """The responses of one or more files, with the features of one layer; those are read as batches need them.

    Args:
        layer: decoder layer, counted from 0.

    Attributes:
        correct, graded, tokens, mean_log_prob, steps: [R] of all files, see `StepFeatures`.
        questions: of each prompt, see `StepFeatures`.
        groups: the numbers of the responses to each of them.
    """

    def __init__(self, stores: Sequence[StepFeatures], layer: int) -> None:
        self._features = [store.of_layer(layer) for store in stores]
        self.correct, self.graded, self.tokens, self.mean_log_prob, self.steps = (
            torch.cat([getattr(store, name) for store in stores])
            for name in ("correct", "graded", "tokens", "mean_log_prob", "steps")
        )
        self._states = [store.states for store in stores]
        self._places = [
            (file, start, start + steps)
            for file, store in enumerate(stores)
            for start, steps in zip(store.starts.tolist(), store.steps.tolist(), strict=True)
        ]
        questions = torch.cat([store.questions for store in stores])
        self.questions, self._group_of = torch.unique(questions, return_inverse=True)
        self.groups: list[list[int]] = [[] for _ in self.questions]
        for response, group in enumerate(self._group_of.tolist()):
            self.groups[group].append(response)

    def __len__(self) -> int:
        """How many responses there are."""
        return len(self._places)

    @property
    def mixed_groups(self) -> int:
        """To how many prompts there are both a right and a wrong response with steps."""
        usable = self.graded & (self.steps > 0)
        kinds = [{bool(self.correct[i] > 0.5) for i in group if usable[i]} for group in self.groups]
        return sum(len(kind) == 2 for kind in kinds)

    def batch(self, responses: Sequence[int]) -> StepBatch:
        """Some responses, by their numbers."""
        places = [self._places[response] for response in responses]
        features = torch.cat([self._features[file][start:stop] for file, start, stop in places]).float()
        states = torch.cat([self._states[file][start:stop] for file, start, stop in places])
        index = torch.tensor(responses)
        steps = self.steps[index]
        mask = torch.arange(max(1, int(steps.max()))) < steps[:, None]
        labels = (self.correct[index] > 0.5).float()
        return StepBatch(features, mask, labels, self.graded[index], self._group_of[index], states)

    def epoch(self, prompts: int, seed: int) -> Iterator[StepBatch]:
        """All responses in an order drawn by `seed`, batches of so many prompts."""
        order = torch.randperm(len(self.groups), generator=torch.Generator().manual_seed(seed)).tolist()
        for start in range(0, len(order), prompts):
            yield self.batch([i for group in order[start : start + prompts] for i in self.groups[group]])

    def in_order(self, responses: int = 512) -> Iterator[StepBatch]:
        """All responses in their order, so many at a time."""
        for numbers in torch.arange(len(self)).split(responses):
            yield self.batch(numbers.tolist())
