"""How linear layers compute where PyTorch's own way is too coarse or too slow; their weights stay as they are, and may
change. For inference alone: the products have no gradient."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn


def matrix_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`left @ right` of two matrices, summed and kept in `dtype`; their own may be narrower."""
    if left.dtype == dtype:
        return left @ right
    if left.device.type == "cpu":
        return left.to(dtype) @ right.to(dtype)
    return torch.mm(left, right, out_dtype=dtype)


def use_float32_output(head: nn.Linear) -> None:
    """Have a linear layer of 16-bit weights give its sums without rounding: as logits they are too coarse where a few
    tokens have it all.

    On a GPU that is what its matrix product returns; a CPU makes a copy of the weight in float32 for each.
    """
    head.forward = partial(_float32_linear, head)  # type: ignore[method-assign]


def _float32_linear(head: nn.Linear, features: Tensor) -> Tensor:
    output = matrix_product(features.flatten(0, -2), head.weight.T, torch.float32).unflatten(0, features.shape[:-1])
    return output if head.bias is None else output + head.bias


def use_onednn(model: nn.Module) -> None:
    """Compute the linear layers of a float32 model on CPU by oneDNN, where PyTorch has it: the MKL that it takes leaves
    AMD processors half their speed. 16-bit products are oneDNN's anyway.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:
            module.forward = partial(_onednn_linear, module)  # type: ignore[method-assign]


def _onednn_linear(module: nn.Linear, features: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(features, module.weight, module.bias, "none", [], "")
