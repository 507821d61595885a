"""Logits in float32 from an LM head whose weight is not: 16-bit ones are too coarse where a few tokens have it all."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn


def matrix_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`left @ right` of two matrices, summed and kept in `dtype`; their own may be narrower. Has no gradient."""
    if left.dtype == dtype:
        return left @ right
    if left.device.type == "cpu":
        return left.to(dtype) @ right.to(dtype)
    return torch.mm(left, right, out_dtype=dtype)


def use_float32_output(head: nn.Linear) -> None:
    """Have a linear layer of 16-bit weights, which stay as they are and may change, give its sums without rounding.

    For inference alone. On a GPU that is what its matrix product returns; a CPU makes a copy in float32 for each.
    """
    head.forward = partial(_float32_linear, head)  # type: ignore[method-assign]


def _float32_linear(head: nn.Linear, features: Tensor) -> Tensor:
    output = matrix_product(features.flatten(0, -2), head.weight.T, torch.float32).unflatten(0, features.shape[:-1])
    return output if head.bias is None else output + head.bias
