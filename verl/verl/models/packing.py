"""From padded rows to the tokens that a model computes, and back.

A micro-batch arrives padded: rows of [prompt | response]. What matters of it lies flat: the response tokens, whose
log-probabilities are wanted, and the step features. A `TokenLayout` says where the model's hidden states hold them, be
the rows computed as they are or packed end to end without padding and cut up among sequence-parallel ranks. Rows that
hold the same tokens share their hidden states: they are computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from verl.models.identical_rows import DistinctRows
from verl.models.ulysses import UlyssesPacking, group_size
from xbai.engine.packed_attention import Packing

Batch = Mapping[str, Tensor]
"""`input_ids attention_mask position_ids [B, T]`, `response_mask [B, R]` (of the last R columns) and, for a model with
a score head, `step_feature_mask [B, T]`."""

BACKBONE_KEYS = ("input_ids", "attention_mask", "position_ids")
NOT_HERE = -1


class TokenLayout:
    """Where the response tokens and step features of a micro-batch lie in what this rank's model computes.

    M response tokens, those whose predecessor is computed on this rank, and K step features, both in the order of rows
    and within a row of columns. Over the ranks of a sequence-parallel group every token and feature occurs once. U of
    the response tokens differ: a token of several identical rows is predicted once.

    No dataclass: FSDP2 copies those on their way into a model.

    Args:
        batch: the padded rows; best on the CPU, from where nothing waits for the device.
        slots: [B, T] index of each token in the flattened hidden states, `NOT_HERE` for those that are not among them.
        device: of the model; None for where the batch lies.
        sp_group: the ranks that share these rows.

    Attributes:
        backbone_inputs: the keyword arguments of the model's backbone, on the device.
        predictors: [U] indices into the flattened hidden states, of the positions before response tokens.
        labels: [U] the tokens that follow.
        features: [K] indices into the flattened hidden states; None without `step_feature_mask`.

    Raises:
        ValueError: a response token has no token before it.
    """

    def __init__(
        self,
        batch: Batch,
        backbone_inputs: dict[str, Any],
        slots: Tensor,
        device: torch.device | None,
        sp_group: dist.ProcessGroup | None = None,
    ) -> None:
        response, attended = batch["response_mask"].bool(), batch["attention_mask"].bool()
        self._shape, self._width = response.shape, attended.shape[1]
        self._sp_group = sp_group
        self._device = device or slots.device
        before_response = slice(self._width - self._shape[1] - 1, self._width - 1)
        if (response & ~attended[:, before_response]).any():
            raise ValueError("every response token needs a token right before it, in the prompt or in the response")
        predictors = slots[:, before_response]
        self._tokens = (response & (predictors != NOT_HERE)).nonzero(as_tuple=True)
        self.backbone_inputs = backbone_inputs
        states, labels = predictors[self._tokens], batch["input_ids"][:, -self._shape[1] :][self._tokens]
        computed, places = states.unique(return_inverse=True)
        self._places = self._moved(places) if len(computed) < len(states) else None
        self.predictors = self._moved(computed)
        self.labels = self._moved(labels.new_zeros(len(computed)).scatter(0, places, labels))
        self.features: Tensor | None = None
        if "step_feature_mask" in batch.keys():  # noqa: SIM118 (a TensorDict's `in` looks for values)
            self._steps = (batch["step_feature_mask"].bool() & (slots != NOT_HERE)).nonzero(as_tuple=True)
            self.features = self._moved(slots[self._steps])

    def _moved(self, values: Tensor) -> Tensor:
        return values.to(self._device, non_blocking=True)

    def each_token(self, values: Tensor) -> Tensor:
        """[M] for each response token what was computed, `values` [U], of the tokens that differ."""
        return values if self._places is None else values[self._places]

    def tokens(self, column: Tensor) -> Tensor:
        """[M] what a column [B, R] (or [B, 1]) says of each response token of this rank."""
        return self._moved(column.expand(self._shape)[self._tokens])

    def steps(self, column: Tensor) -> Tensor:
        """[K] what a column [B, T] (or [B, 1]) says of each step feature of this rank."""
        return self._moved(column.expand(-1, self._width)[self._steps])

    def gather_steps(self, values: Tensor) -> Tensor:
        """`restore_steps` on the device, through which gradients flow back to `values` of this rank.

        A loss of whole rows is computed by every rank that shares them: each adds 1 / (number of those ranks) of it.
        """
        whole = values.new_zeros(self._shape[0], self._width)
        whole = whole.index_put(tuple(self._moved(place) for place in self._steps), values)
        return whole if self._sp_group is None else _SumOfRanks.apply(whole, self._sp_group)

    @property
    def ranks(self) -> int:
        """How many ranks share these rows."""
        return group_size(self._sp_group)

    def restore_tokens(self, values: Tensor) -> Tensor:
        """[B, R] with `values` [M] at the response tokens and 0 elsewhere; those of all ranks that share the rows."""
        return self._restored(values, self._tokens, self._shape[1])

    def restore_steps(self, values: Tensor) -> Tensor:
        """[B, T] with `values` [K] at the step features and 0 elsewhere; those of all ranks that share the rows."""
        return self._restored(values, self._steps, self._width)

    @torch.no_grad()
    def _restored(self, values: Tensor, places: tuple[Tensor, ...], width: int) -> Tensor:
        whole = values.new_zeros(self._shape[0], width)
        whole[tuple(place.to(whole.device, non_blocking=True) for place in places)] = values
        if self._sp_group is not None:
            dist.all_reduce(whole, group=self._sp_group)
        return whole


class _SumOfRanks(torch.autograd.Function):
    """The sum over ranks that go on with it alike; each rank's gradient then is the same part of the whole."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.ranks = dist.get_world_size(group)
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.ranks, None


def trim_padding(attention_mask: Tensor, response_length: int) -> tuple[int, int]:
    """How many columns can be cut off at the left and at the right: they are padding in all rows [B, P+R] of a batch.

    Rows are left-padded prompts and right-padded responses of R columns. At least one column of either remains.
    """
    used = attention_mask.bool().any(0)
    prompt_length = len(used) - response_length
    left = int(used[: prompt_length - 1].long().cumsum(0).eq(0).sum())
    right = int(used[prompt_length + 1 :].flip(0).long().cumsum(0).eq(0).sum())
    return left, right


def padded_layout(batch: Batch, device: torch.device | None = None) -> TokenLayout:
    """Compute the rows as they are, without the columns that are padding in every one of them."""
    distinct, time = DistinctRows.of(batch), batch["input_ids"].shape[1]
    left, right = trim_padding(batch["attention_mask"], batch["response_mask"].shape[1])
    columns = slice(left, time - right)
    narrow = {name: batch[name][distinct.rows, columns] for name in BACKBONE_KEYS}
    slots = torch.full((len(distinct.rows), time), NOT_HERE, device=batch["input_ids"].device)
    slots[:, columns] = torch.arange(narrow["input_ids"].numel(), device=slots.device).view(len(slots), -1)
    inputs = {name: value.to(device or slots.device, non_blocking=True) for name, value in narrow.items()}
    return TokenLayout(batch, inputs, slots[distinct.kinds], device)


def packed_layout(
    batch: Batch, device: torch.device | None = None, sp_group: dist.ProcessGroup | None = None
) -> TokenLayout:
    """Compute the rows end to end as one, no padding among them; each rank of `sp_group` an equal slice of it.

    Where the tokens do not divide among the ranks, a short sequence of its own fills them up.
    """
    distinct = DistinctRows.of(batch)
    input_ids, attention_mask, position_ids = (batch[name][distinct.rows] for name in BACKBONE_KEYS)
    attended = attention_mask.bool()
    total = int(attended.sum())
    slots = torch.where(attended, attended.flatten().cumsum(0).view_as(attended) - 1, NOT_HERE)
    ranks = group_size(sp_group)
    fill = -total % ranks if total else ranks
    ids = F.pad(input_ids[attended], (0, fill))
    positions = torch.cat([position_ids[attended], torch.arange(fill, device=ids.device)])
    if sp_group is not None:
        size = len(ids) // ranks
        start = dist.get_rank(sp_group) * size
        ids, positions = ids[start : start + size], positions[start : start + size]
        slots = torch.where((slots >= start) & (slots < start + size), slots - start, NOT_HERE)
    lengths = [length for length in [*attended.sum(-1).tolist(), fill] if length]
    device = device or ids.device
    extents = torch.tensor([0, *lengths]).cumsum(0).int().to(device, non_blocking=True), max(lengths)
    inputs = {
        "input_ids": ids[None].to(device, non_blocking=True),
        "position_ids": positions[None].to(device, non_blocking=True),
        "attention_mask": None,
        "packing": Packing(*extents) if sp_group is None else UlyssesPacking(*extents, sp_group),
    }
    return TokenLayout(batch, inputs, slots[distinct.kinds], device, sp_group)


def layout_maker(
    packed: bool, device: torch.device, sp_group: dist.ProcessGroup | None = None
) -> Callable[[Batch], TokenLayout]:
    """The way from a micro-batch to its layout that `model.use_remove_padding` and sequence parallelism ask for."""
    if packed:
        return partial(packed_layout, device=device, sp_group=sp_group)
    return partial(padded_layout, device=device)
