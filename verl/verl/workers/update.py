"""The update that policy, critic and supervised fine-tuning share: the gradient of a loss, and optimiser steps.

Every rank makes the same collectives whatever its data: a loss makes none but those of a sequence-parallel group, and
those that open and close an optimiser step (`MicroBatches`, `Update.totals`, the sums of metrics, the optimiser's) are
made by all ranks alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from verl.models.fsdp import Countable, all_reduce_last, local_device
from verl.models.packing import Batch, TokenLayout
from verl.models.ulysses import group_size
from verl.optim.optimizers import Optimizers
from verl.trainer.config.schema import UpdateConfig
from verl.workers.batching.micro_batches import MicroBatches, MicroBatching
from xbai.errors import UserError

Output = TypeVar("Output")
Totals = TypeVar("Totals")


class LossOutput(NamedTuple):
    """A micro-batch's share of a loss; the shares of all micro-batches and ranks add up to it."""

    loss: Tensor
    """Scalar with gradient."""
    metrics: dict[str, Tensor]
    """Scalars without gradient, shares as well, by the names they are logged under."""


class Loss(ABC, Generic[Output, Totals]):
    """What an update minimises, over the rows of one optimiser step on all ranks.

    Attributes:
        metric: the one in `LossOutput.metrics` that is the loss itself.
    """

    metric: str

    @abstractmethod
    def local_totals(self, batch: Batch) -> Tensor:
        """[n] float64: what `batch` adds to the totals that the loss is divided by."""

    @abstractmethod
    def totals(self, sums: Tensor) -> Totals:
        """From the sum of `local_totals` over all ranks."""

    @abstractmethod
    def __call__(self, output: Output, layout: TokenLayout, batch: Batch, totals: Totals) -> LossOutput:
        """One micro-batch's share.

        Args:
            output: of the model on `layout`.
            layout: of `batch`.
            batch: a micro-batch.
            totals: of the whole optimiser step.
        """

    def counts(self, totals: Totals) -> dict[str, float]:
        """What of the totals is worth logging."""
        return {}


@dataclass(frozen=True)
class Update(Generic[Output, Totals]):
    """The gradient of one optimiser step."""

    model: nn.Module
    """Sharded by `shard_model`."""
    forward: Callable[[TokenLayout], Output]
    """Its output in training."""
    loss: Loss[Output, Totals]
    layout: Callable[[Batch], TokenLayout]
    """Of a micro-batch."""
    sp_group: dist.ProcessGroup | None = None
    """The ranks that compute the same rows together; None for every rank its own."""

    def totals(self, batches: Iterable[Batch]) -> Totals:
        """Of the rows of one optimiser step: `batches` of this rank and those of the others. A collective."""
        sums = torch.stack([self.loss.local_totals(batch) for batch in batches]).sum(0).to(local_device())
        dist.all_reduce(sums)
        # All ranks of a sequence-parallel group have counted the same rows.
        return self.loss.totals(sums / group_size(self.sp_group))

    def backward(self, micro_batches: Countable[Batch], totals: Totals) -> Iterator[dict[str, Tensor]]:
        """Add up the gradients of `micro_batches`, as many on every rank; yields each one's share of the metrics."""
        self.model.train()
        for batch in all_reduce_last(self.model, micro_batches):
            yield self._backward(batch, totals)

    def _backward(self, batch: Batch, totals: Totals) -> dict[str, Tensor]:
        layout = self.layout(batch)
        loss, metrics = self.loss(self.forward(layout), layout, batch, totals)
        # FSDP2 takes the mean over ranks where the shares are to be added up.
        (loss * dist.get_world_size()).backward()
        return metrics


class RolloutUpdate(Generic[Output, Totals]):
    """The update on a batch of rollouts, of policy and critic: one optimiser step a mini-batch.

    Args:
        update: makes the gradients.
        optimizer: of the update's model.
        section: `actor` or `critic`; its `ppo_mini_batch_size` is in prompts of the whole job.
        responses_per_prompt: rows of each prompt.
        packed: padding is not computed.
        name: of the section, for messages and metrics.
        balance: the group of metrics that say how even the micro-batches were.
    """

    def __init__(
        self,
        update: Update[Output, Totals],
        optimizer: Optimizers,
        section: UpdateConfig,
        responses_per_prompt: int,
        packed: bool,
        name: str,
        balance: str,
    ) -> None:
        self._update, self._optimizer, self._section = update, optimizer, section
        self._responses_per_prompt, self._name, self._balance = responses_per_prompt, name, balance
        sp_size = group_size(update.sp_group)
        self._micro_batching = MicroBatching.for_update(section, packed, sp_size, dist.get_world_size())
        self._shares = dist.get_world_size() // sp_size
        self._rows = section.ppo_mini_batch_size * responses_per_prompt // self._shares

    def optimiser_steps(self, data: Batch) -> int:
        """How many there are for a batch."""
        return self._section.ppo_epochs * (len(data["input_ids"]) // self._rows)

    def run(self, data: Batch, release: Callable[[], None] | None = None) -> dict[str, float]:
        """Run `ppo_epochs` passes over this rank's rows.

        Args:
            data: as many rows on every rank; the same rows on all ranks of a sequence-parallel group.
            release: called after each step's last backward pass, to free what its forward passes kept.

        Returns:
            Means over the optimiser steps, the same on every rank; `skipped_updates` counts those whose gradient was
            not finite.

        Raises:
            UserError: the batch is not whole mini-batches.
        """
        steps = [self._step(mini_batch, release) for mini_batch in self._mini_batches(data)]
        skipped = sum(step.pop("skipped") for step in steps)
        means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        return means | {f"{self._name}/skipped_updates": skipped} | _of_parts(self._optimizer.advance_schedules())

    def _mini_batches(self, data: Batch) -> Iterator[dict[str, Tensor]]:
        """This rank's share of each mini-batch, `ppo_epochs` times over."""
        rows, size = len(data["input_ids"]), self._section.ppo_mini_batch_size
        if rows % self._rows:
            raise UserError(
                f"{self._name}.ppo_mini_batch_size={size} prompts of {self._responses_per_prompt} responses must "
                f"divide the batch of {rows * self._shares} responses (data.train_batch_size)"
            )
        for _ in range(self._section.ppo_epochs):
            for chosen in self._row_order(rows).split(self._rows):
                yield {name: column[chosen] for name, column in data.items()}

    def _row_order(self, rows: int) -> Tensor:
        """The same on all ranks of a sequence-parallel group."""
        if not self._section.shuffle:
            return torch.arange(rows)
        order = torch.randperm(rows)
        if self._update.sp_group is None:
            return order
        order = order.to(local_device())
        dist.broadcast(order, group=self._update.sp_group, group_src=0)
        return order.cpu()

    def _step(self, mini_batch: Batch, release: Callable[[], None] | None) -> dict[str, float]:
        update = self._update
        totals = update.totals([mini_batch])
        micro_batches = MicroBatches(mini_batch, self._micro_batching)
        metrics = summed_over_ranks(update.backward(micro_batches, totals))
        if release is not None:
            release()
        stepped = self._optimizer.step(self._section.grad_clip, metrics[update.loss.metric])
        skipped = {"skipped": stepped.pop("skipped")}
        balance = {f"{self._balance}/{name}": value for name, value in micro_batches.balance().items()}
        return metrics | update.loss.counts(totals) | balance | _of_parts(stepped) | skipped


def _of_parts(metrics: Mapping[str, float]) -> dict[str, float]:
    """The optimiser's `what/part` as `part/what`; the policy's are the actor's."""
    names = {name: name.split("/") for name in metrics}
    return {f"{'actor' if part == 'policy' else part}/{what}": metrics[name] for name, (what, part) in names.items()}


def loss_mask(batch: Batch) -> Tensor:
    """[B, R] bool: response tokens of the trajectories that could be graded."""
    return batch["response_mask"].bool() & batch["graded"].bool()[:, None]


def summed_over_ranks(shares: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """Each scalar's sum over the micro-batches of a rank, which `shares` are of, and over all ranks. A collective."""
    sums: dict[str, Tensor] = {}
    for share in shares:
        sums = {name: sums.get(name, 0) + value for name, value in share.items()}
    stacked = torch.stack(list(sums.values())).double()
    dist.all_reduce(stacked)
    return dict(zip(sums, stacked.tolist(), strict=True))
