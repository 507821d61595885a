"""Causal attention over packed sequences, for the models that use transformers' public attention interface.

Importing this module registers it: `from_pretrained(..., attn_implementation=PACKED_ATTENTION)`, then
`model(input_ids=[1, N], position_ids=[1, N], packing=Packing(...), use_cache=False)`. transformers makes no mask for
an attention that it does not know and hands `packing` down to it, also when a checkpointed layer is recomputed.
"""

from __future__ import annotations

import importlib.util
import inspect
from functools import cache, cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from verl.utils import ulysses
from xbai.errors import UserError

PACKED_ATTENTION = "packed"
# What other attention functions of transformers are given by some models, and this one cannot compute.
UNSUPPORTED = ("softcap", "s_aux", "position_bias")
FLASH_CAPABILITY = (8, 0)


class Packing:
    """Where each sequence lies in a row of packed tokens.

    No dataclass: FSDP2 copies those before each layer, and `lengths` would be read anew from the device.

    Args:
        cu_seqlens: int32 [S+1] on the tokens' device, cumulative lengths from 0 to N. Every token belongs to a
            sequence; tokens that fill N up to a multiple of the ranks are one of their own.
        max_seqlen: the length of the longest sequence.
        sp_group: the ranks that share these N tokens, in equal contiguous slices; None for one rank alone.
    """

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, sp_group: dist.ProcessGroup | None = None) -> None:
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = max_seqlen
        self.sp_group = sp_group

    @cached_property
    def lengths(self) -> list[int]:
        """The length of each sequence."""
        return self.cu_seqlens.diff().tolist()


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each sequence of `packing`; one of transformers' attention functions.

    Args:
        module: the attention layer.
        query: [1, heads, n, d], n = N / ranks of `packing.sp_group`, with the rotary embedding applied.
        key: [1, kv_heads, n, d].
        value: the same.
        attention_mask: None.
        packing: where the sequences lie in the N tokens.
        scaling: of the scores; None for 1/sqrt(d).
        dropout: 0.
        sliding_window: a token attends to itself and the `sliding_window - 1` before it; None for all before it.
        **kwargs: what other attention functions use.

    Returns:
        [1, n, heads, d], None

    Raises:
        ValueError: the model was called without `packing`, or with rows of a batch.
        UserError: the model's attention is of a kind that this function does not compute.
    """
    if packing is None or query.shape[0] != 1:
        raise ValueError(
            f"attention {PACKED_ATTENTION!r} computes packed sequences: call the model with input_ids [1, N], no "
            "attention_mask and packing=Packing(...), or load it with another attn_implementation"
        )
    _check_kind(module, dropout, kwargs)
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if packing.sp_group is not None:
        query, key, value = ulysses.split_heads(query, key, value, packing.sp_group)
    compute = _varlen if _has_varlen_kernel(query) else _by_sequence
    output = compute(query, key, value, packing, scaling, sliding_window)
    if packing.sp_group is not None:
        output = ulysses.join_heads(output, packing.sp_group)
    return output.unsqueeze(0), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def _check_kind(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    name = type(module).__name__
    if dropout:
        raise UserError(f"{name} uses dropout, packed attention has none: set attention_dropout to 0 in config.json")
    given = [option for option in UNSUPPORTED if kwargs.get(option) is not None]
    if given or not getattr(module, "is_causal", True):
        kind = " and ".join(given) or "attention that is not causal"
        raise UserError(f"packed sequences do not support the {kind} of {name}: set use_remove_padding=false")


def _has_varlen_kernel(query: Tensor) -> bool:
    halves = query.dtype in (torch.float16, torch.bfloat16)
    return halves and query.is_cuda and torch.cuda.get_device_capability(query.device) >= FLASH_CAPABILITY


@cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, window: int | None
) -> Tensor:
    """All sequences in one kernel: flash_attn's where it is installed, else the one in PyTorch."""
    extents = (packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen)
    window_size = (-1 if window is None else window - 1, 0)
    if _has_flash_attn():
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            query, key, value, *extents, softmax_scale=scaling, causal=True, window_size=window_size
        )
    from torch.nn.attention.varlen import varlen_attn

    if not _varlen_attn_takes_gqa():
        key, value = (_repeat_heads(x, query) for x in (key, value))
        return varlen_attn(query, key, value, *extents, scale=scaling, window_size=window_size)
    return varlen_attn(query, key, value, *extents, scale=scaling, window_size=window_size, enable_gqa=True)


@cache
def _varlen_attn_takes_gqa() -> bool:
    """PyTorch 2.11 does not name `enable_gqa`, 2.13 insists on it."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _repeat_heads(x: Tensor, query: Tensor) -> Tensor:
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


def _by_sequence(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, window: int | None
) -> Tensor:
    """Where no kernel takes packed sequences: each in a call of its own, no score between two of them computed."""
    if query.is_cuda:
        # In float32 the only CUDA kernel that takes fewer key/value heads makes the whole [L, L] matrix.
        key, value = (_repeat_heads(x, query) for x in (key, value))
    sequences = zip(*(x.split(packing.lengths) for x in (query, key, value)), strict=True)
    outputs = [_causal(*(x.transpose(0, 1)[None] for x in parts), scaling, window) for parts in sequences]
    return torch.cat([output.squeeze(0).transpose(0, 1) for output in outputs])


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Attention of one sequence, [1, heads, L, d]; a window is computed in blocks of its size, never as [L, L]."""
    length = query.shape[2]
    enable_gqa = query.shape[1] != key.shape[1]
    if window is None or length <= window:
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=enable_gqa
        )
    outputs = []
    for start in range(0, length, window):
        stop, first = min(start + window, length), max(start - window + 1, 0)
        distance = torch.arange(start, stop, device=query.device)[:, None] - torch.arange(
            first, stop, device=query.device
        )
        outputs.append(
            functional.scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, first:stop],
                value[:, :, first:stop],
                attn_mask=(distance >= 0) & (distance < window),
                scale=scaling,
                enable_gqa=enable_gqa,
            )
        )
    return torch.cat(outputs, dim=2)
