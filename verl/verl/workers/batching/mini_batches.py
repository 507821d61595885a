"""A rank's share of each mini-batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from verl.models.fsdp import local_device
from verl.models.packing import Batch
from verl.models.ulysses import group_size
from verl.trainer.config.updates import UpdateConfig
from xbai.errors import UserError


class MiniBatching:
    """How a rank cuts its rows into mini-batches, one for each optimiser step.

    Args:
        section: reads `ppo_mini_batch_size`, in prompts of the whole job, `ppo_epochs` and `shuffle`.
        responses_per_prompt: rows of each prompt.
        sp_group: the ranks that compute the same rows together; None for every rank its own.
        name: of the section, for messages.

    Raises:
        UserError: a mini-batch that ranks cannot share evenly.
    """

    def __init__(
        self, section: UpdateConfig, responses_per_prompt: int, sp_group: dist.ProcessGroup | None, name: str
    ) -> None:
        self._epochs, self._shuffle, self._sp_group = section.ppo_epochs, section.shuffle, sp_group
        rows = section.ppo_mini_batch_size * responses_per_prompt
        sp_size = group_size(sp_group)
        self._groups = dist.get_world_size() // sp_size
        if rows % self._groups:
            raise UserError(
                f"{name}.ppo_mini_batch_size * rollout.n = {rows} must be a multiple of the number of ranks"
                f"{' over ulysses_sequence_parallel_size' if sp_size > 1 else ''}, {self._groups}"
            )
        self._rows = rows // self._groups
        self._name = f"{name}.ppo_mini_batch_size={section.ppo_mini_batch_size} prompts of {responses_per_prompt}"

    def optimiser_steps(self, data: Batch) -> int:
        """How many mini-batches `split` makes."""
        return self._epochs * (len(data["input_ids"]) // self._rows)

    def split(self, data: Batch) -> Iterator[dict[str, Tensor]]:
        """This rank's share of each mini-batch, `ppo_epochs` times over.

        Raises:
            UserError: the batch is not whole mini-batches.
        """
        rank_rows = len(data["input_ids"])
        if rank_rows % self._rows:
            raise UserError(
                f"{self._name} responses must divide the batch of {rank_rows * self._groups} responses "
                "(data.train_batch_size)"
            )
        for _ in range(self._epochs):
            for rows in self._row_order(rank_rows).split(self._rows):
                yield {name: column[rows] for name, column in data.items()}

    def _row_order(self, rows: int) -> Tensor:
        if not self._shuffle:
            return torch.arange(rows)
        order = torch.randperm(rows)
        if self._sp_group is None:
            return order
        order = order.to(local_device())
        dist.broadcast(order, group=self._sp_group, group_src=0)
        return order.cpu()
