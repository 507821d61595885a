"""A rank's share of each mini-batch, and what the ranks' shares of a metric add up to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from verl.utils.fsdp import local_device
from verl.utils.packing import Batch
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
        self, section: Mapping[str, Any], responses_per_prompt: int, sp_group: dist.ProcessGroup | None, name: str
    ) -> None:
        self._epochs, self._shuffle, self._sp_group = section["ppo_epochs"], section["shuffle"], sp_group
        rows = section["ppo_mini_batch_size"] * responses_per_prompt
        sp_size = 1 if sp_group is None else dist.get_world_size(sp_group)
        groups = dist.get_world_size() // sp_size
        if rows % groups:
            raise UserError(
                f"{name}.ppo_mini_batch_size * rollout.n = {rows} must be a multiple of the number of ranks"
                f"{' over ulysses_sequence_parallel_size' if sp_size > 1 else ''}, {groups}"
            )
        self._rows = rows // groups

    def split(self, data: Batch) -> Iterator[dict[str, Tensor]]:
        """This rank's share of each mini-batch, `ppo_epochs` times over."""
        for _ in range(self._epochs):
            for rows in self._row_order(len(data["input_ids"])).split(self._rows):
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


def summed_over_ranks(shares: Mapping[str, Tensor]) -> dict[str, float]:
    """Each scalar's sum over all ranks. A collective."""
    stacked = torch.stack(list(shares.values())).double()
    dist.all_reduce(stacked)
    return dict(zip(shares, stacked.tolist()))
