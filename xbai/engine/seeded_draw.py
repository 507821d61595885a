"""Drawing tokens so that a sample depends on its seed and its logits alone, whatever shares the batch with it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
# float64 holds every sum of weights that is at most this.
_MOST_WEIGHT = 2**52
_CPU_ELEMENTS = 2**18
_GPU_ELEMENTS = 2**25


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> Tensor:
    """Number `position` of the random stream of each seed: SplitMix64 (Steele, Lea and Flood, 2014), any term at once.

    Args:
        seeds: [rows] uint64.
        positions: [rows] uint64, the tokens sampled before.

    Returns:
        [rows] float64 in [0, 1), on the CPU: multiples of 2^-53, the same on every machine.
    """
    bits = seeds + (positions + 1) * _GOLDEN_GAMMA
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    bits = bits ^ (bits >> 31)
    return torch.from_numpy((bits >> 11) * 2.0**-53)


def draw_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Sample from softmax(logits) by the inverse of its distribution function.

    One number a row is all the randomness, where a race of exponentials (vLLM's way) takes one a token: 39 million for
    256 rows of a vocabulary of 152 thousand. The function is summed over integers, whose sum is exact in any order, so
    that no batch shape, device or number of threads changes it. They are 2^34 for the likeliest of 152 thousand tokens:
    coarse only for those 10 billion times less likely.

    Args:
        logits: [rows, vocab], float32; -inf for tokens that must not come.
        uniforms: [rows], float64 in [0, 1), on the logits' device.

    Returns:
        Token ids [rows].
    """
    scale = _MOST_WEIGHT >> (logits.shape[1] - 1).bit_length()
    rows = rows_at_once(logits)
    tokens = []
    for part, numbers in zip(logits.split(rows), uniforms.split(rows), strict=True):
        sums = (part - part.amax(-1, keepdim=True)).exp_().mul_(scale).long().cumsum_(-1)
        threshold = (numbers[:, None] * sums[:, -1:]).long()
        tokens.append(torch.searchsorted(sums, threshold, right=True)[:, 0])
    # Only NaN among the logits leads beyond the last token.
    return torch.cat(tokens).clamp(max=logits.shape[1] - 1)


def rows_at_once(logits: Tensor) -> int:
    """How many rows of [rows, vocab] to work on at a time: few for a core's cache, on a GPU 0.4 GB of intermediates."""
    elements = _CPU_ELEMENTS if logits.device.type == "cpu" else _GPU_ELEMENTS
    return max(1, elements // logits.shape[1])
