"""What is measured over several steps, and becomes one record."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from verl.models.packing import Batch
from xbai.sprm import auc, trajectory_scores


class WindowTotals(NamedTuple):
    """Of all ranks since the last record, in plain values, as a checkpoint holds them.

    Attributes:
        lm_loss, score_loss: sums over the steps.
        right_side, wrong_side: graded steps whose score is above 0.5, and the others.
        scores, labels: of each graded trajectory, and whether its answer was right.
        steps, tokens: how many; tokens of responses.
    """

    lm_loss: float
    score_loss: float
    right_side: float
    wrong_side: float
    scores: list[float]
    labels: list[float]
    steps: int
    tokens: int


class MetricsWindow:
    """Sums over the steps since the last record, of this rank until all ranks are added up."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reset()

    def _reset(self) -> None:
        # The first four of `WindowTotals`.
        self._sums = torch.zeros(4, dtype=torch.double, device=self._device)
        self._scores: list[float] = []
        self._labels: list[float] = []
        self._steps = self._tokens = 0

    def add_losses(self, lm_loss: Tensor, score_loss: Tensor) -> None:
        """Shares of one micro-batch."""
        self._sums[:2] += torch.stack([lm_loss, score_loss]).detach().double()

    def add_scores(self, step_logits: Tensor, batch: Batch) -> None:
        """Trajectory scores of one micro-batch's graded rows, and on which side of 0.5 their steps are."""
        graded = batch["graded"]
        logits = step_logits.detach()[batch["step_feature_mask"] & graded[:, None]]
        self._sums[2:] += torch.stack([(logits > 0).sum(), (logits <= 0).sum()])
        self._scores += trajectory_scores(step_logits.detach(), batch["step_feature_mask"])[graded].tolist()
        self._labels += batch["correct"][graded].tolist()

    def end_step(self, tokens: int) -> None:
        """Count one step of `tokens` response tokens over all ranks."""
        self._steps += 1
        self._tokens += tokens

    def totals(self) -> WindowTotals:
        """Of all ranks; the same on every rank. A collective."""
        sums = self._sums.clone()
        dist.all_reduce(sums)
        gathered: list[tuple[list[float], list[float]]] = [([], [])] * dist.get_world_size()
        dist.all_gather_object(gathered, (self._scores, self._labels))
        scores, labels = (list(chain.from_iterable(parts)) for parts in zip(*gathered, strict=True))
        lm_loss, score_loss, right, wrong = sums.tolist()
        return WindowTotals(lm_loss, score_loss, right, wrong, scores, labels, self._steps, self._tokens)

    def go_on_from(self, totals: WindowTotals) -> None:
        """Begin where a window with these totals was. The first rank takes over what all ranks had."""
        self._reset()
        self._steps, self._tokens = totals.steps, totals.tokens
        if dist.get_rank() == 0:
            self._sums += self._sums.new_tensor(totals[:4])
            self._scores, self._labels = list(totals.scores), list(totals.labels)

    def flush(self) -> dict[str, float]:
        """Means over the window, which begins anew; the same on every rank. A collective."""
        totals = self.totals()
        metrics = {"sft/loss": totals.lm_loss / totals.steps, "sft/tokens": float(totals.tokens)}
        if totals.scores:
            sides = totals.right_side, totals.wrong_side
            metrics |= {
                "score/loss": totals.score_loss / totals.steps,
                "score/one_sided": max(sides) / sum(sides),
                "score/auc": auc(torch.tensor(totals.scores), torch.tensor(totals.labels)),
            }
        self._reset()
        return metrics
