"""What the workers' models do with a batch, its tokens shared out evenly over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from verl.models.identical_rows import sum_over_kinds
from verl.protocol import DataProto
from verl.single_controller import GroupMethod
from verl.trainer.config.schema import UpdateConfig
from verl.workers.batching.seqlen_balancing import rows_by_rank
from xbai.errors import UserError

PROMPT_KEYS = ("input_ids", "attention_mask", "position_ids")
MODEL_INPUT_KEYS = (*PROMPT_KEYS, "prompts", "responses", "response_mask")

Method = GroupMethod[..., DataProto]


@dataclass(frozen=True)
class Phases:
    """Calls methods of worker groups."""

    balance: bool
    """`trainer.balance_batch`; false: the rows keep their order."""
    responses: int
    """To one prompt."""

    def compute(self, method: Method, batch: DataProto, metrics: dict[str, float], **meta_info: Any) -> None:
        """Run a model over `batch`, and add the tensors and metrics that it gives."""
        inputs = DataProto(batch.batch.select(*MODEL_INPUT_KEYS), meta_info=meta_info)
        order = self._order_for(method, batch, len(batch), metrics)
        output = method(inputs[order])
        metrics |= output.meta_info.pop("metrics")
        batch.union(output[order.argsort()])

    def update(
        self,
        method: Method,
        batch: DataProto,
        keys: Sequence[str],
        section: UpdateConfig,
        step: int,
        metrics: dict[str, float],
    ) -> None:
        """Train a model, of this `section`, on the columns `keys` of `batch`, and add the metrics that it gives; errors
        name `step`."""
        order = self._order_for(method, batch, section.ppo_mini_batch_size * self.responses, metrics)
        try:
            metrics |= method(batch.select(keys)[order]).meta_info["metrics"]
        except UserError as error:
            raise UserError(f"step {step}: {error}") from error

    def _order_for(self, method: Method, batch: DataProto, block: int, metrics: dict[str, float]) -> Tensor:
        """The order of rows in which the ranks' parts of every `block` of rows have about as many tokens to compute.

        The metric is the worst of a step's phases.
        """
        shares, lengths = method.shares, batch.batch["attention_mask"].sum(-1)
        if len(batch) % shares:
            # As in validation: the parts are filled up with copies.
            return torch.arange(len(batch))
        kinds = batch.batch["kinds"]
        order = rows_by_rank(lengths, block, shares, self.balance, kinds)
        of_rank = torch.stack([sum_over_kinds(lengths[rows], kinds[rows]) for rows in order.chunk(shares)]).float()
        name = "perf/rank_tokens_max_over_mean"
        metrics[name] = max(metrics.get(name, 1.0), float(of_rank.max() / of_rank.mean()))
        return order
