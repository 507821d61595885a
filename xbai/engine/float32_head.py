"""Logits in float32 from an LM head whose weight is not: 16-bit ones are too coarse where a few tokens have it all."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def use_float32_output(head: nn.Linear) -> None:
    """Have a linear layer of 16-bit weights, which stay as they are and may change, give its sums without rounding.

    For inference alone. On a GPU that is what its matrix product returns; a CPU makes a copy in float32 for each.
    """
    head.forward = partial(_float32_linear, head)


def _float32_linear(head: nn.Linear, features: Tensor) -> Tensor:
    bias = None if head.bias is None else head.bias.float()
    if not features.is_cuda:
        return F.linear(features.float(), head.weight.float(), bias)
    output = torch.mm(features.flatten(0, -2), head.weight.T, out_dtype=torch.float32)
    output = output.unflatten(0, features.shape[:-1])
    return output if bias is None else output + bias
