"""Attention over packed sequences, forward and backward, against float32 sequence by sequence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from verl.bringup.step import Context, require, step
from xbai.engine.packed_attention import Packing, SharedPrefixPacking, packed_attention

HEADS, KV_HEADS = 12, 2
OUTPUT_ERROR, GRADIENT_ERROR = 0.03, 0.03
MEANS = (
    "The kernel that computes packed sequences here (flash_attn's where it is installed, else PyTorch's varlen_attn) "
    "gives other numbers than plain attention in float32; see xbai/engine/packed_attention.py `_varlen`. Until it is "
    "mended train with model.use_remove_padding=false and leave the score service off. "
)


@step(means=MEANS + "Here grouped-query heads of packed training rows are wrong.", quick=True)
def attention_grouped_heads(context: Context) -> str:
    """12 query and 2 key heads, sequences of 1 to 700 tokens, heads of 128 and of 64."""
    errors = [
        _compare(context, [1, 5, 700, 64], head_dim=head_dim) for head_dim in ((128, 64) if context.on_gpu else (32,))
    ]
    return _figure(errors)


@step(means=MEANS + "Here the window of models with sliding attention is.", quick=True)
def attention_window(context: Context) -> str:
    """A sliding window of 128 tokens."""
    return _figure([_compare(context, [300, 17, 512], window=128)])


@step(
    means=MEANS + "Here prefixes that texts share are: the score service scores wrongly. Where there are more keys "
    "than queries, the causal mask must be aligned to the end of the keys.",
    quick=True,
)
def attention_shared_prefixes(context: Context) -> str:
    """Sequences that begin with the first 40 tokens of the first one, and so have more keys than queries."""
    return _figure([_compare(context, [90, 30, 55], shared=40)])


def _figure(errors: Sequence[tuple[float, float]]) -> str:
    output, gradient = (max(column) for column in zip(*errors, strict=True))
    require(output < OUTPUT_ERROR, f"outputs are up to {output:.3g} off; at most {OUTPUT_ERROR}")
    require(gradient < GRADIENT_ERROR, f"gradients are {gradient:.3g} of the largest off; at most {GRADIENT_ERROR}")
    return f"outputs within {output:.2g} of float32, gradients within {gradient:.2g} of the largest"


def _compare(
    context: Context, lengths: list[int], head_dim: int = 64, window: int | None = None, shared: int = 0
) -> tuple[float, float]:
    """Largest error of outputs, and of gradients relative to the largest gradient.

    Args:
        context: where.
        lengths: tokens of each sequence that are its own.
        head_dim: width of a head.
        window: of a sliding window.
        shared: so many tokens of the first sequence all others attend to as well.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    drawn = [torch.randn(1, heads, tokens, head_dim, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    fast = [x.to(context.device, torch.bfloat16).requires_grad_() for x in drawn]
    exact = [x.detach().float().requires_grad_() for x in fast]
    module = torch.nn.Module()
    packing = _packing(context.device, lengths, shared)
    query, key, value = fast
    output = packed_attention(module, query, key, value, None, packing=packing, sliding_window=window)[0]
    query, key, value = exact
    wanted = _plain(query, key, value, _paths(lengths, shared), lengths, window)
    weights = torch.randn(output.shape, generator=generator).to(context.device)
    gradients = torch.autograd.grad((output.float() * weights).sum(), fast)
    wanted_gradients = torch.autograd.grad((wanted * weights).sum(), exact)
    off = max(
        float((one.float() - other).abs().max() / other.abs().max())
        for one, other in zip(gradients, wanted_gradients, strict=True)
    )
    return float((output.float() - wanted).detach().abs().max()), off


def _paths(lengths: list[int], shared: int) -> list[list[int]]:
    """Which of the tokens each sequence attends to, its own last."""
    own = [list(range(end - length, end)) for end, length in zip(accumulate(lengths), lengths, strict=True)]
    return [own[0], *(own[0][:shared] + tokens for tokens in own[1:])]


def _packing(device: str, lengths: list[int], shared: int) -> Packing:
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    if not shared:
        return Packing(ends, max(lengths))
    paths = _paths(lengths, shared)
    of_keys = [len(path) for path in paths]
    key_ends = torch.tensor([0, *accumulate(of_keys)], dtype=torch.int32, device=device)
    index = torch.tensor([token for path in paths for token in path], device=device)
    return SharedPrefixPacking(ends, max(lengths), index, key_ends, max(of_keys))


def _plain(
    query: Tensor, key: Tensor, value: Tensor, paths: list[list[int]], lengths: list[int], window: int | None
) -> Tensor:
    """[1, n, heads, d]: scores, mask and softmax written out, each sequence alone."""
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    outputs = []
    for path, length in zip(paths, lengths, strict=True):
        own = torch.tensor(path[-length:], device=query.device)
        seen = torch.tensor(path, device=query.device)
        scores = query[0, :, own] @ key[0, :, seen].transpose(1, 2) / query.shape[-1] ** 0.5
        distance = torch.arange(len(path))[-length:, None] - torch.arange(len(path))
        visible = (distance >= 0) & (distance < (window or len(path)))
        scores = scores.masked_fill(~visible.to(query.device), float("-inf"))
        outputs.append(functional.softmax(scores, dim=-1) @ value[0, :, seen])
    return torch.cat(outputs, dim=1).transpose(0, 1)[None]
