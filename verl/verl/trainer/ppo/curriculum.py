"""A curriculum of prompts by their pass rates: prompts that are always solved, or never, teach little."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn
from xbai.seeds import derived_seed

Observation = tuple[int, Tensor, Tensor, Tensor]
"""The step, and places in the data set with how many responses were right and how many wrong there, [prompts] each."""


class PassRateCurriculum:
    """Batches of the prompts whose pass rates may be nearest to one half, where responses to a prompt differ most.

    What is known of a pass rate is a Beta distribution: that of no knowledge, and the prompt's graded responses, which
    count half after `half_life` epochs, since the policy changes. A batch is drawn by Thompson sampling (Qu et al.,
    arXiv 2507.04632): a pass rate from each prompt's distribution, and those prompts whose draws are nearest to one
    half. What is unknown is tried, and what was too hard or too easy comes back as its responses are forgotten.

    Iterating over it is an epoch: as many batches as the data has, in which prompts may come again or not at all. What
    is drawn follows from `seed` and from what was observed, so that `state_dict` resumes it exactly.

    Args:
        dataset: all prompts.
        batch_size: different prompts of a batch.
        half_life: in epochs, of as many steps as the data has batches.
    """

    def __init__(self, dataset: RLHFDataset, batch_size: int, half_life: float, seed: int) -> None:
        self._dataset, self._batch_size, self._seed = dataset, batch_size, seed
        self._kept = 0.5 ** (1 / (half_life * len(self)))
        """Of what is known, after a step."""
        self._places = {row: place for place, row in enumerate(dataset.values("row_index"))}
        self._right, self._wrong = np.zeros(len(dataset)), np.zeros(len(dataset))
        self._drawn = self._batch = self._step = 0
        self._is_left_out = np.zeros(len(dataset), bool)
        # Rollouts of the next step may be drawn while those of this one are observed.
        self._observed: deque[Observation] = deque()

    def __len__(self) -> int:
        return len(self._dataset) // self._batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self._batch < len(self):
            self._batch += 1
            yield collate_fn([self._dataset[place] for place in self._draw()], self._dataset.tokenizer.pad_token_id)
        self._batch = 0

    def observe(self, step: int, rows: Iterable[int], correct: Tensor, graded: Tensor) -> None:
        """Keep which responses of a `step` were right, by the `row_index` of their prompts; all three [B]. A response
        without a grade says nothing."""
        found, prompts = torch.tensor([self._places[row] for row in rows]).unique(return_inverse=True)
        right, wrong = (torch.bincount(prompts[graded & (correct == value)], minlength=len(found)) for value in (1, 0))
        self._observed.append((step, found, right, wrong))

    def advance(self, step: int) -> dict[str, float]:
        """Before prompts are drawn for the policy of `step`: take up what was observed in the steps before it. What is
        observed meanwhile in `step` itself waits, so that a run does not depend on which comes first.

        Returns metrics: the share of prompts that have been tried, and their mean pass rate when they were.
        """
        right, wrong = np.zeros_like(self._right), np.zeros_like(self._wrong)
        while self._observed and self._observed[0][0] < step:
            _, places, were_right, were_wrong = self._observed.popleft()
            right[places] += were_right.numpy()
            wrong[places] += were_wrong.numpy()
        kept, self._step = self._kept ** (step - self._step), step
        self._right, self._wrong = self._right * kept + right, self._wrong * kept + wrong
        known = self._right + self._wrong
        tried = known > 0
        metrics = {"curriculum/prompts_tried": float(np.mean(tried))}
        if tried.any():
            metrics["curriculum/pass_rate"] = float(np.mean(self._right[tried] / known[tried]))
        return metrics

    def leave_out(self, rows: Iterable[int]) -> None:
        """From now on draw prompts with one of these `row_index` only where there are no others."""
        self._is_left_out[:] = False
        self._is_left_out[[self._places[row] for row in rows]] = True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: tensors and plain values."""
        return {
            "drawn": self._drawn,
            "batch": self._batch,
            "step": self._step,
            "right": torch.from_numpy(self._right),
            "wrong": torch.from_numpy(self._wrong),
            "observed": list(self._observed),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was."""
        self._drawn, self._batch, self._step = state["drawn"], state["batch"], state["step"]
        self._right, self._wrong = state["right"].numpy(), state["wrong"].numpy()
        self._observed = deque(state["observed"])

    def _draw(self) -> np.ndarray:
        self._drawn += 1
        generator = np.random.default_rng(derived_seed(self._seed, "curriculum", self._drawn))
        pass_rates = generator.beta(1 + self._right, 1 + self._wrong)
        return np.lexsort((np.abs(pass_rates - 0.5), self._is_left_out))[: self._batch_size]
