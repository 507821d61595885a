"""oneDNN for float32 matrix products on CPU, where PyTorch takes MKL: that leaves AMD processors half their speed."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn


def use_onednn(model: nn.Module) -> None:
    """Compute the linear layers of a float32 model on CPU by oneDNN, where PyTorch was built with it.

    For inference alone, the operator has no gradient. Weights stay as they are and may change. 16-bit products are
    oneDNN's anyway.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:
            module.forward = partial(_linear, module)  # type: ignore[method-assign]


def _linear(module: nn.Linear, features: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(features, module.weight, module.bias, "none", [], "")
