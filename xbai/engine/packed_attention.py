"""Causal attention over packed sequences, for the models that use transformers' public attention interface.

Importing this module registers it: `from_pretrained(..., attn_implementation=PACKED_ATTENTION)`, then
`model(input_ids=[1, N], position_ids=[1, N], packing=Packing(...), use_cache=False)`. transformers makes no mask for
an attention that it does not know and hands `packing` down to it, also when a checkpointed layer is recomputed.
The trainer packs its micro-batches, the scorer the texts of concurrent requests.
"""

from __future__ import annotations

import inspect
from functools import cache, cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from xbai.errors import UserError

PACKED_ATTENTION = "packed"
# What other attention functions of transformers are given by some models, and this one cannot compute.
UNSUPPORTED = ("softcap", "s_aux", "position_bias")
FLASH_CAPABILITY = (8, 0)
BLOCK = 1024


class Packing:
    """Where each sequence lies in a row of packed tokens. Subclasses say what else attention needs of other tokens.

    No dataclass: FSDP2 copies those before each layer, and `lengths` would be read anew from the device.

    Args:
        cu_seqlens: int32 [S+1] on the tokens' device, cumulative lengths from 0 to N. Every token belongs to a
            sequence.
        max_seqlen: the length of the longest sequence.

    Attributes:
        cu_seqlens_k, max_seqlen_k: the same of the keys: a sequence has at least as many as tokens, and its tokens are
            the last of them.
    """

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int) -> None:
        self.cu_seqlens = self.cu_seqlens_k = cu_seqlens
        self.max_seqlen = self.max_seqlen_k = max_seqlen

    @cached_property
    def lengths(self) -> list[int]:
        """The length of each sequence."""
        return self.cu_seqlens.diff().tolist()

    @cached_property
    def key_lengths(self) -> list[int]:
        """How many keys each sequence has."""
        return self.cu_seqlens_k.diff().tolist()

    def gather(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What attention is to be computed on, of what a layer made of its tokens [n, heads, d]."""
        return query, key, value

    def scatter(self, output: Tensor) -> Tensor:
        """From attention's output on what `gather` returned to that of the layer's tokens [n, heads, d]."""
        return output


class SharedPrefixPacking(Packing):
    """Sequences that attend to tokens of others too: of those before them, which began with the same tokens.

    Args:
        cu_seqlens, max_seqlen: of the tokens that are each sequence's own.
        key_index: [M] which of the N tokens each sequence attends to, its own last.
        cu_seqlens_k, max_seqlen_k: how they divide among the sequences.
    """

    def __init__(
        self, cu_seqlens: Tensor, max_seqlen: int, key_index: Tensor, cu_seqlens_k: Tensor, max_seqlen_k: int
    ) -> None:
        super().__init__(cu_seqlens, max_seqlen)
        self.cu_seqlens_k, self.max_seqlen_k = cu_seqlens_k, max_seqlen_k
        self._key_index = key_index

    def gather(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of a prefix once for each sequence that begins with it."""
        return query, key[self._key_index], value[self._key_index]


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
        module: the attention layer, without dropout.
        query: [1, heads, n, d] with the rotary embedding applied; n = N, unless ranks share the tokens.
        key, value: [1, kv_heads, n, d].
        attention_mask: None.
        packing: where the sequences lie in the tokens.
        scaling: of the scores; None for 1/sqrt(d).
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
    query, key, value = packing.gather(*(x.squeeze(0).transpose(0, 1) for x in (query, key, value)))
    compute = _varlen if _has_varlen_kernel(query) else _by_sequence
    output = compute(query, key, value, packing, scaling, sliding_window)
    return packing.scatter(output).unsqueeze(0), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def why_not_packed(model: PreTrainedModel) -> str | None:
    """Why `packed_attention` cannot stand in for this model's attention; None where it can.

    The attention is of another kind or is not told where sequences begin, or the model mixes tokens elsewhere.
    """
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"its {kinds.pop()} layers do not take them"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if "dynamic" in rope or rope == "longrope":
        return f"its {rope} position embedding depends on the longest of them"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention caps its scores (attn_logit_softcapping)"
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        return "its attention has sinks"
    if not model.is_backend_compatible() or not _hands_arguments_on(model.base_model):
        return "its attention does not take them"
    return None


def _hands_arguments_on(backbone: Any) -> bool:
    signatures = (inspect.signature(module.forward) for module in (backbone, backbone.layers[0]))
    return all(any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()) for signature in signatures)


def _check_kind(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    name = type(module).__name__
    if dropout:
        raise UserError(f"{name} uses dropout, packed attention has none: set attention_dropout to 0 in config.json")
    given = [option for option in UNSUPPORTED if kwargs.get(option) is not None]
    if given or not getattr(module, "is_causal", True):
        kind = " and ".join(given) or "attention that is not causal"
        raise UserError(
            f"packed sequences do not support the {kind} of {name}: set use_remove_padding=false to train this model"
        )


def _has_varlen_kernel(query: Tensor) -> bool:
    halves = query.dtype in (torch.float16, torch.bfloat16)
    return halves and query.is_cuda and torch.cuda.get_device_capability(query.device) >= FLASH_CAPABILITY


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, window: int | None
) -> Tensor:
    """All sequences in one kernel: flash_attn's where it is installed, else the one in PyTorch."""
    extents = (packing.cu_seqlens, packing.cu_seqlens_k, packing.max_seqlen, packing.max_seqlen_k)
    window_size = (-1 if window is None else window - 1, 0)
    if is_flash_attn_2_available():
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            query, key, value, *extents, softmax_scale=scaling, causal=True, window_size=window_size
        )
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scaling, "window_size": window_size}
    if _varlen_attn_takes_gqa():
        options["enable_gqa"] = True
    else:
        key, value = (_repeat_heads(x, query) for x in (key, value))
    return cast(Tensor, varlen_attn(query, key, value, *extents, **options))


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
    keys, values = (x.split(packing.key_lengths) for x in (key, value))
    sequences = zip(query.split(packing.lengths), keys, values, strict=True)

    def alone(x: Tensor) -> Tensor:
        return x.transpose(0, 1)[None]

    outputs = [_causal(alone(q), alone(k), alone(v), scaling, window) for q, k, v in sequences]
    return torch.cat([output.squeeze(0).transpose(0, 1) for output in outputs])


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Attention of one sequence, [1, heads, L, d], to [1, kv_heads, K, d]; the last L of them are its own tokens.

    What the fast kernel does not compute (a window, more keys than tokens) is computed in blocks, never as [L, K].
    """
    length, before = query.shape[2], key.shape[2] - query.shape[2]
    attend = partial(functional.scaled_dot_product_attention, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    if before == 0 and (window is None or length <= window):
        return attend(query, key, value, is_causal=True)
    reach, block, outputs = window or key.shape[2], window or BLOCK, []
    for start in range(before, before + length, block):
        stop, first = min(start + block, before + length), max(start - reach + 1, 0)
        distance = torch.arange(start, stop, device=query.device)[:, None] - torch.arange(
            first, stop, device=query.device
        )
        outputs.append(
            attend(
                query[:, :, start - before : stop - before],
                key[:, :, first:stop],
                value[:, :, first:stop],
                attn_mask=(distance >= 0) & (distance < reach),
            )
        )
    return torch.cat(outputs, dim=2)
