"""Ulysses sequence parallelism (arXiv 2309.14509): a rank holds a slice of the tokens, and for attention, of the heads.

Everything but attention works on a token alone, so each rank of a group computes N/sp of the tokens. Before attention
an all-to-all gives each rank all N tokens of 1/sp of the heads; after it another one gives it back its own tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from verl.models.fsdp import adopt_timeout
from xbai.engine.packed_attention import Packing
from xbai.errors import UserError


class UlyssesPacking(Packing):
    """Sequences whose N tokens the ranks of a group share, in equal contiguous slices.

    Those tokens that fill N up to a multiple of the ranks are a sequence of their own in `cu_seqlens`.
    """

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, group: dist.ProcessGroup) -> None:
        super().__init__(cu_seqlens, max_seqlen)
        self._group = group

    def gather(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `split_heads`."""
        return split_heads(query, key, value, self._group)

    def scatter(self, output: Tensor) -> Tensor:
        """See `join_heads`."""
        return join_heads(output, self._group)


def group_size(group: dist.ProcessGroup | None) -> int:
    """How many ranks share the rows of one: those of a sequence-parallel group, or 1 without one."""
    return 1 if group is None else dist.get_world_size(group)


def sequence_parallel_group(size: int) -> dist.ProcessGroup | None:
    """The group of `size` contiguous ranks that this rank belongs to; None for a size of 1.

    Every rank must call it, once and with the same size: creating groups is a collective of the whole world.

    Raises:
        UserError: the ranks do not divide into groups of that size.
    """
    if size == 1:
        return None
    world = dist.get_world_size()
    if size < 1 or world % size:
        raise UserError(
            f"ulysses_sequence_parallel_size={size} does not divide the {world} ranks of the actor: "
            "choose a divisor of trainer.nnodes x trainer.n_gpus_per_node"
        )
    group, _ = dist.new_subgroups(size)
    adopt_timeout(group)
    return group


def check_head_counts(num_heads: int, num_kv_heads: int, sp: int) -> None:
    """Raise a `UserError` where a model's attention heads do not divide among `sp` ranks.

    Key/value heads that do not divide are repeated, which any number of them allows that divides the query heads.
    """
    if num_heads % num_kv_heads:
        raise UserError(f"the model has {num_heads} attention heads, no multiple of its {num_kv_heads} key/value heads")
    if num_heads % sp:
        raise UserError(
            f"ulysses_sequence_parallel_size={sp} does not divide the model's {num_heads} attention heads: "
            f"choose one of {', '.join(str(size) for size in range(1, num_heads + 1) if num_heads % size == 0)}"
        )


def split_heads(query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """From this rank's tokens of all heads to all tokens of this rank's heads, in one all-to-all.

    Args:
        query: [N/sp, heads, d]; N/sp is the same on all ranks of the group.
        key, value: [N/sp, kv_heads, d].

    Returns:
        [N, heads/sp, d], and twice [N, lcm(kv_heads, sp)/sp, d]; views of one buffer.
    """
    sp = dist.get_world_size(group)
    repeats = math.lcm(key.shape[1], sp) // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    by_rank = [x.unflatten(1, (sp, -1)).transpose(0, 1) for x in (query, key, value)]
    received = _AllToAll.apply(torch.cat(by_rank, dim=2), group)
    return received.flatten(0, 1).split([x.shape[2] for x in by_rank], dim=1)


def join_heads(output: Tensor, group: dist.ProcessGroup) -> Tensor:
    """From all tokens of this rank's heads [N, heads/sp, d] to its tokens of all heads [N/sp, heads, d]."""
    by_rank = output.unflatten(0, (dist.get_world_size(group), -1))
    return _AllToAll.apply(by_rank, group).transpose(0, 1).flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    """Exchanges equal blocks along dimension 0, which has one for each rank: its own inverse, and its own gradient."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        blocks = blocks.contiguous()
        received = torch.empty_like(blocks)
        dist.all_to_all_single(received, blocks, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(gradient, ctx.group), None
