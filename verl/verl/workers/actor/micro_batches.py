"""Cutting a rank's rows into micro-batches, the same number on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor

from verl.utils.fsdp import local_device
from verl.utils.torch_functional import trim_padding
from xbai.errors import UserError


@dataclass(frozen=True)
class MicroBatching:
    """How many rows one forward pass takes: a fixed number, or as many as fit a token budget.

    Attributes:
        rows: rows of a micro-batch; unused where there is a token budget.
        max_tokens: padded tokens of a micro-batch, or None.
        key: the configuration key behind it, for messages.
    """

    rows: int
    max_tokens: int | None = None
    key: str = "micro_batch_size_per_gpu"

    @classmethod
    def for_update(cls, actor: DictConfig) -> MicroBatching:
        """From `actor_rollout_ref.actor`."""
        if actor.get("use_dynamic_bsz", False):
            return cls(1, actor.ppo_max_token_len_per_gpu, "actor.ppo_max_token_len_per_gpu")
        whole_job = actor.get("ppo_micro_batch_size")
        if whole_job is not None:
            return cls(max(1, whole_job // dist.get_world_size()), key="actor.ppo_micro_batch_size")
        return cls(actor.ppo_micro_batch_size_per_gpu, key="actor.ppo_micro_batch_size_per_gpu")

    @classmethod
    def for_log_prob(cls, section: DictConfig) -> MicroBatching:
        """From `actor_rollout_ref.rollout` or `.ref`."""
        if section.get("log_prob_use_dynamic_bsz", False):
            return cls(1, section.log_prob_max_token_len_per_gpu, "log_prob_max_token_len_per_gpu")
        return cls(section.log_prob_micro_batch_size_per_gpu, key="log_prob_micro_batch_size_per_gpu")

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise UserError(f"{self.key}={self.rows} must be at least 1")

    def split(self, attention_mask: Tensor, response_length: int) -> list[Tensor]:
        """Row indices of each local micro-batch; together they hold every row once.

        Args:
            attention_mask: [batch, prompt + response] of this rank.
            response_length: columns of the response.

        Raises:
            UserError: the budget is below the width of the batch.
        """
        if self.max_tokens is None:
            return list(torch.arange(len(attention_mask)).split(self.rows))
        if attention_mask.shape[1] > self.max_tokens:
            raise UserError(
                f"{self.key}={self.max_tokens} is below max_prompt_length + max_response_length = "
                f"{attention_mask.shape[1]}: one response may not fit"
            )
        return self._pack(attention_mask, response_length)

    def _pack(self, attention_mask: Tensor, response_length: int) -> list[Tensor]:
        # A padded micro-batch is as wide as its longest prompt and its longest response together.
        prompts = attention_mask[:, :-response_length].sum(-1).tolist()
        responses = attention_mask[:, -response_length:].sum(-1).tolist()
        longest_first = attention_mask.sum(-1).argsort(descending=True, stable=True).tolist()
        packed: list[list[int]] = []
        widest_prompt = widest_response = 0
        for row in longest_first:
            widest_prompt, widest_response = max(widest_prompt, prompts[row]), max(widest_response, responses[row])
            if packed and (len(packed[-1]) + 1) * (widest_prompt + widest_response) <= self.max_tokens:
                packed[-1].append(row)
            else:
                packed.append([row])
                widest_prompt, widest_response = prompts[row], responses[row]
        return [torch.tensor(rows) for rows in packed]


def agreed_count(local_count: int) -> int:
    """The largest count over ranks. A collective."""
    count = torch.tensor(local_count, device=local_device())
    dist.all_reduce(count, dist.ReduceOp.MAX)
    return int(count)


def trim(batch: TensorDict, response_length: int) -> tuple[TensorDict, int, int]:
    """Cut off the columns that are padding in every row.

    Args:
        batch: tensors [B, prompt + response], [B, response] and [B].
        response_length: columns of the response.

    Returns:
        The narrower batch, and how many columns went at its left (prompt) and right (response) side.
    """
    time = batch["input_ids"].shape[1]
    left, right = trim_padding(batch["attention_mask"], response_length)

    def cut(value: Tensor) -> Tensor:
        if value.dim() < 2:
            return value
        return value[:, left : time - right] if value.shape[1] == time else value[:, : response_length - right]

    return batch.apply(cut), left, right
