"""The critic on this rank: values before the update, and the clipped regression on the returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from verl.trainer.ppo.core_algos import Denominators, compute_value_loss, token_weights
from verl.utils.fsdp import all_reduce_last, local_device, reshard
from verl.utils.optim import Optimizers
from verl.utils.packing import Batch, layout_maker
from verl.workers.actor.joint_loss import loss_mask
from verl.workers.actor.micro_batches import MicroBatches, MicroBatching
from verl.workers.critic.value_model import ValueModel
from verl.workers.mini_batches import MiniBatching, means_over_steps, summed_over_ranks

INPUT_KEYS = ("input_ids", "attention_mask", "position_ids", "response_mask")
UPDATE_KEYS = (*INPUT_KEYS, "values", "returns", "graded")


class DataParallelPPOCritic:
    """A rank of the critic; micro-batches and collectives are those of `DataParallelPPOActor`.

    Args:
        config: the `critic` section, without nulls (see `critic_config`).
        model: sharded by `shard_model`; with `model.use_remove_padding` its attention is the packed one.
        optimizer: its part is called `critic`.
        sp_group: the ranks that compute the same rows together (sequence parallelism); needs packing.

    Raises:
        UserError: a batch size that ranks cannot share evenly.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        model: ValueModel,
        optimizer: Optimizers,
        sp_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self._device = local_device()
        self._world_size = dist.get_world_size()
        self._sp_size = 1 if sp_group is None else dist.get_world_size(sp_group)
        self._clip, self._grad_clip = config["cliprange_value"], config["grad_clip"]
        packed = config["model"]["use_remove_padding"]
        self._layout = layout_maker(packed, self._device, sp_group)
        self._update_batching = MicroBatching.for_update(config, packed, self._sp_size, self._world_size)
        self._forward_batching = MicroBatching.for_values(config, packed, self._sp_size)
        self._mini_batching = MiniBatching(config, config["rollout_n"], sp_group, "critic")

    @torch.no_grad()
    def compute_values(self, data: Batch) -> Tensor:
        """Values before each response token, in evaluation mode.

        Args:
            data: `INPUT_KEYS`; the same on all ranks of a sequence-parallel group.

        Returns:
            [B, R] on the CPU, 0 on padding.
        """
        self.model.eval()
        data = {key: data[key] for key in INPUT_KEYS}
        values = torch.zeros(data["response_mask"].shape, device=self._device)
        for rows, batch in MicroBatches(data, self._forward_batching):
            layout = self._layout(batch)
            values[rows] = layout.restore_tokens(self.model(layout))[: len(rows)]
        reshard(self.model)
        return values.cpu()

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
        self.model.train()
        mini_batches = self._mini_batching.split({key: data[key] for key in UPDATE_KEYS})
        metrics = means_over_steps(map(self._update, mini_batches)) | self.optimizer.advance_schedules()
        return {f"critic/{name.removesuffix('/critic')}": value for name, value in metrics.items()}

    def _update(self, mini_batch: Batch) -> dict[str, float]:
        tokens = loss_mask(mini_batch).sum().double().to(self._device)
        dist.all_reduce(tokens)
        # All ranks of a sequence-parallel group have counted the same rows.
        totals = Denominators(float(tokens) / self._sp_size, 0.0)
        micro_batches = MicroBatches(mini_batch, self._update_batching)
        shares = (self._forward_backward(batch, totals) for _, batch in all_reduce_last(self.model, micro_batches))
        metrics = summed_over_ranks(shares) | micro_batches.balance()
        return metrics | self.optimizer.step(self._grad_clip, metrics["vf_loss"])

    def _forward_backward(self, batch: Batch, totals: Denominators) -> dict[str, Tensor]:
        layout = self._layout(batch)
        weights = layout.tokens(token_weights(loss_mask(batch), "token-mean", totals))
        values = self.model(layout)
        result = compute_value_loss(values, layout.tokens(batch["values"]), layout.tokens(batch["returns"]), self._clip)
        loss = (weights * result.loss).sum()
        # FSDP2 takes the mean over ranks where the shares are to be added up.
        (loss * self._world_size).backward()
        return {
            "vf_loss": loss.detach(),
            "vf_clipfrac": (weights * result.clipped).sum(),
            "vpred_mean": (weights * values.detach()).sum(),
        }
