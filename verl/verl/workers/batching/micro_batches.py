"""Cutting a rank's rows into micro-batches, the same number on every rank."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from verl.models.fsdp import local_device
from verl.models.identical_rows import DistinctRows
from verl.models.packing import Batch
from verl.trainer.config.schema import ActorConfig, CriticConfig, RefConfig, RolloutConfig, UpdateConfig
from verl.workers.batching.seqlen_balancing import balanced_partitions
from verl.workers.phase_profiler import PHASE_PROFILER
from xbai.errors import UserError


class RowSizes(NamedTuple):
    """The tokens of each row of a batch."""

    prompts: list[int]
    responses: list[int]

    @classmethod
    def of(cls, batch: Batch) -> RowSizes:
        """Count the tokens of `attention_mask` before and in the response."""
        mask, response_length = batch["attention_mask"], batch["response_mask"].shape[1]
        return cls(mask[:, :-response_length].sum(-1).tolist(), mask[:, -response_length:].sum(-1).tolist())

    @property
    def totals(self) -> list[int]:
        """Prompt and response together."""
        return [prompt + response for prompt, response in zip(self.prompts, self.responses, strict=True)]


@dataclass(frozen=True)
class MicroBatching:
    """How many rows one forward pass takes: a fixed number, or as many as fit a token budget.

    Attributes:
        rows: rows of a micro-batch; unused where there is a token budget.
        max_tokens: how many tokens a micro-batch may compute, or None.
        packed: padding is not computed, and so does not count.
        key: the configuration key of the budget, for messages.
    """

    rows: int
    max_tokens: int | None = None
    packed: bool = False
    key: str = ""

    @classmethod
    def for_update(cls, section: UpdateConfig, packed: bool, sp_size: int, world_size: int) -> MicroBatching:
        """From `actor_rollout_ref.actor` or `critic`; of `world_size` ranks, `sp_size` share as many budgets."""
        rows = section.ppo_micro_batch_size_per_gpu
        if isinstance(section, ActorConfig) and section.ppo_micro_batch_size is not None:
            rows = max(1, section.ppo_micro_batch_size * sp_size // world_size)
        budget = section.ppo_max_token_len_per_gpu * sp_size if section.use_dynamic_bsz else None
        return cls(rows, budget, packed, "ppo_max_token_len_per_gpu")

    @classmethod
    def for_values(cls, section: CriticConfig, packed: bool, sp_size: int) -> MicroBatching:
        """From `critic`, whose values before the update need a forward pass only."""
        budget = section.forward_max_token_len_per_gpu * sp_size if section.use_dynamic_bsz else None
        return cls(section.forward_micro_batch_size_per_gpu, budget, packed, "forward_max_token_len_per_gpu")

    @classmethod
    def for_log_prob(cls, section: RolloutConfig | RefConfig, packed: bool, sp_size: int) -> MicroBatching:
        """From `actor_rollout_ref.rollout` or `.ref`."""
        budget = section.log_prob_max_token_len_per_gpu * sp_size if section.log_prob_use_dynamic_bsz else None
        return cls(section.log_prob_micro_batch_size_per_gpu, budget, packed, "log_prob_max_token_len_per_gpu")

    def tokens(self, sizes: RowSizes, rows: list[int]) -> int:
        """What a forward pass over `rows` computes."""
        if self.packed:
            return sum(sizes.prompts[row] + sizes.responses[row] for row in rows)
        widest = (max((column[row] for row in rows), default=0) for column in sizes)
        return len(rows) * _padded_width(*widest)

    def most_tokens(self, longest_row: int) -> int:
        """What the largest micro-batch may have, of rows of at most `longest_row` tokens."""
        return self.rows * longest_row if self.max_tokens is None else self.max_tokens

    def fewest(self, sizes: RowSizes) -> int:
        """The smallest number of micro-batches that `fill` can share the rows out over; it can for any larger one.

        Raises:
            UserError: a row alone is over the budget.
        """
        rows = len(sizes.prompts)
        if self.max_tokens is None:
            return -(-rows // self.rows)
        longest = max(self.tokens(sizes, [row]) for row in range(rows))
        if longest > self.max_tokens:
            raise UserError(f"{self.key}: a budget of {self.max_tokens} tokens is less than the {longest} of one row")
        if not self.packed:
            return len(_neighbours(sizes, self.max_tokens))
        count = -(-sum(sizes.totals) // self.max_tokens)
        while max(self.tokens(sizes, part) for part in self._parts(sizes, count, self.max_tokens)) > self.max_tokens:
            count += 1
        return count

    def fill(self, sizes: RowSizes, count: int) -> list[list[int]]:
        """Share the rows out over `count` micro-batches, at least `fewest`.

        Every rank's largest come first: ranks wait for each other at each layer's all-gather, and so in each
        micro-batch for the one that has the most tokens in it.

        Returns:
            Row numbers of each micro-batch, together every row once. With a budget none is over it, and all have about
            as many tokens; with a number of rows, those of like length are together. None is empty where there are as
            many rows.
        """
        if self.max_tokens is None:
            totals = sizes.totals
            longest_first = sorted(range(len(totals)), key=lambda row: -totals[row])
            return [part.tolist() for part in torch.tensor(longest_first).tensor_split(count)]
        return sorted(self._parts(sizes, count, self.max_tokens), key=lambda rows: -self.tokens(sizes, rows))

    def _parts(self, sizes: RowSizes, count: int, budget: int) -> list[list[int]]:
        if self.packed:
            return balanced_partitions(sizes.totals, count, equally_many=False)
        return _level_neighbours(sizes, count, budget)


def _padded_width(prompt: int, response: int) -> int:
    # A padded micro-batch is as wide as its longest prompt and its longest response, and at least a column of each.
    return max(prompt, 1) + max(response, 1)


def _neighbours(sizes: RowSizes, budget: int) -> list[list[int]]:
    """Rows of like length together, as many as fit `budget`: the fewest parts that the sorted rows can be cut into."""
    parts: list[list[int]] = []
    prompt = response = 0
    for row in sorted(range(len(sizes.prompts)), key=lambda row: -sizes.prompts[row] - sizes.responses[row]):
        prompt, response = max(prompt, sizes.prompts[row]), max(response, sizes.responses[row])
        if parts and (len(parts[-1]) + 1) * _padded_width(prompt, response) <= budget:
            parts[-1].append(row)
        else:
            parts.append([row])
            prompt, response = sizes.prompts[row], sizes.responses[row]
    return parts


def _level_neighbours(sizes: RowSizes, count: int, max_tokens: int) -> list[list[int]]:
    """`_neighbours` in `count` parts, the largest of which is as small as can be."""
    budgets = range(1, max_tokens + 1)
    lowest = bisect_left(budgets, -count, key=lambda budget: -len(_neighbours(sizes, budget)))
    parts = _neighbours(sizes, budgets[lowest])
    while len(parts) < min(count, len(sizes.prompts)):
        part = max((part for part in parts if len(part) > 1), key=len)
        parts.remove(part)
        parts += [part[: len(part) // 2], part[len(part) // 2 :]]
    return parts + [[] for _ in range(count - len(parts))]


class MicroBatches:
    """A rank's rows, in as many micro-batches as every other rank has. Making one is a collective.

    Identical rows are in one micro-batch, where they count as the one that is computed.

    Args:
        batch: this rank's rows; the same on all ranks of a sequence-parallel group.
        batching: how many rows go together.

    Attributes:
        rows: numbers of the rows in each micro-batch.
    """

    def __init__(self, batch: Batch, batching: MicroBatching) -> None:
        self._batch = batch
        distinct = DistinctRows.of(batch)
        members = distinct.members()
        sizes = RowSizes.of({name: batch[name][distinct.rows] for name in ("attention_mask", "response_mask")})
        count = torch.tensor(batching.fewest(sizes), device=local_device())
        dist.all_reduce(count, dist.ReduceOp.MAX)
        parts = batching.fill(sizes, int(count))
        self.rows = [[row for kind in part for row in members[kind]] for part in parts]
        self._tokens = [batching.tokens(sizes, part) for part in parts]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The columns of each micro-batch.

        A rank with fewer rows than micro-batches makes up for it with single rows without any response token or step,
        which add nothing to a loss; their row numbers are none.
        """
        blank = ("response_mask", "step_feature_mask")
        for rows in self.rows:
            part = {name: column[rows or [0]] for name, column in self._batch.items()}
            yield part if rows else part | {n: torch.zeros_like(part[n]) for n in blank if n in part}
            PHASE_PROFILER.tick()

    def map(self, compute: Callable[[Batch], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The columns [B, ...] that `compute` makes of the rows, micro-batch by micro-batch; on the CPU."""
        found: dict[str, Tensor] = {}
        for rows, batch in zip(self.rows, self, strict=True):
            for name, values in compute(batch).items():
                whole = found.setdefault(name, values.new_zeros(len(self._batch["input_ids"]), *values.shape[1:]))
                whole[rows] = values[: len(rows)]
        return {name: values.cpu() for name, values in found.items()}

    def balance(self) -> dict[str, float]:
        """`micro_batches` of a rank, and `tokens_per_micro_batch_max_over_mean`: what ranks wait for, those of the rank
        that has the most in each micro-batch, over what they compute. A collective."""
        most = torch.tensor(self._tokens, device=local_device())
        computed = most.sum()
        dist.all_reduce(most, dist.ReduceOp.MAX)
        dist.all_reduce(computed)
        waited_for = float(most.sum()) * dist.get_world_size()
        return {
            "micro_batches": float(len(self._tokens)),
            "tokens_per_micro_batch_max_over_mean": waited_for / float(computed),
        }
