"""The critic on this rank: values before the update, and the clipped regression on the returns."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from verl.models.fsdp import local_device, reshard
from verl.models.packing import BACKBONE_KEYS, Batch, TokenLayout, layout_maker
from verl.models.ulysses import group_size
from verl.models.value_model import ValueModel
from verl.optim.optimizers import Optimizers
from verl.trainer.config.schema import CriticConfig
from verl.trainer.ppo.core_algos import Denominators, compute_value_loss, token_weights
from verl.workers.batching.micro_batches import MicroBatches, MicroBatching
from verl.workers.update import Loss, LossOutput, RolloutUpdate, Update, loss_mask

INPUT_KEYS = (*BACKBONE_KEYS, "response_mask")
UPDATE_KEYS = (*INPUT_KEYS, "values", "returns", "graded")


class ValueLoss(Loss[Tensor, Denominators]):
    """The mean over tokens of the clipped regression on the returns.

    Args:
        clip: how far values may move from the old ones.
    """

    metric = "critic/vf_loss"

    def __init__(self, clip: float) -> None:
        self._clip = clip

    def local_totals(self, batch: Batch) -> Tensor:
        """[1] float64: the tokens that count."""
        return loss_mask(batch).sum().double()[None]

    def totals(self, sums: Tensor) -> Denominators:
        """From the sum of `local_totals` over all ranks."""
        return Denominators(tokens=float(sums), sequences=0.0)

    def __call__(self, output: Tensor, layout: TokenLayout, batch: Batch, totals: Denominators) -> LossOutput:
        """One micro-batch's share, of `output`, the values [M]."""
        weights = layout.tokens(token_weights(loss_mask(batch), "token-mean", totals))
        old_values, returns = layout.tokens(batch["values"]), layout.tokens(batch["returns"])
        result = compute_value_loss(output, old_values, returns, self._clip)
        loss = (weights * result.loss).sum()
        metrics = {
            self.metric: loss.detach(),
            "critic/vf_clipfrac": (weights * result.clipped).sum(),
            "critic/vpred_mean": (weights * output.detach()).sum(),
        }
        return LossOutput(loss, metrics)


class DataParallelPPOCritic:
    """A rank of the critic; micro-batches and collectives are those of `DataParallelPPOActor`.

    Args:
        config: the `critic` section.
        responses_per_prompt: `rollout.n`.
        model: sharded by `shard_model`; with `model.use_remove_padding` its attention is the packed one.
        optimizer: its part is called `critic`.
        sp_group: the ranks that compute the same rows together (sequence parallelism); needs packing.
    """

    def __init__(
        self,
        config: CriticConfig,
        responses_per_prompt: int,
        model: ValueModel,
        optimizer: Optimizers,
        sp_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        packed = config.model.use_remove_padding
        self._layout = layout_maker(packed, local_device(), sp_group)
        self._batching = MicroBatching.for_values(config, packed, group_size(sp_group))
        update = Update(model, model, ValueLoss(config.cliprange_value), self._layout, sp_group)
        self._update = RolloutUpdate(update, optimizer, config, responses_per_prompt, packed, "critic", "critic")

    @torch.no_grad()
    def compute_values(self, data: Batch) -> Tensor:
        """Values before each response token, in evaluation mode.

        Args:
            data: `INPUT_KEYS`; the same on all ranks of a sequence-parallel group.

        Returns:
            [B, R] on the CPU, 0 on padding.
        """
        self.model.eval()
        found = MicroBatches({key: data[key] for key in INPUT_KEYS}, self._batching).map(self._values)
        reshard(self.model)
        return found["values"].float()

    def _values(self, batch: Batch) -> dict[str, Tensor]:
        layout = self._layout(batch)
        return {"values": layout.restore_tokens(self.model(layout))}

    def update_critic(self, data: Batch) -> dict[str, float]:
        """Run `ppo_epochs` passes over this rank's rows, one optimiser step a mini-batch.

        Args:
            data: `UPDATE_KEYS`, as many rows on every rank. Trajectories that are not graded do not count.

        Returns:
            `critic/*`, means over the optimiser steps, the same on every rank; `critic/skipped_updates` counts those
            whose gradient was not finite.

        Raises:
            UserError: the batch is not whole mini-batches.
        """
        return self._update.run({key: data[key] for key in UPDATE_KEYS})
