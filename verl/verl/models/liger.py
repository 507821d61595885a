"""Liger's Triton kernels for the norms and MLPs of one model."""

from __future__ import annotations

import importlib.util
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from xbai.errors import UserError

KEY = "model.use_liger"


def check_liger(device: str, key: str = KEY) -> None:
    """Raise a `UserError` where Liger's kernels cannot run."""
    if device == "cpu":
        raise UserError(f"{key}=true needs a GPU and cannot act on CPU; leave it at its default")
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(f"{key}=true needs liger-kernel (pip install 'liger-kernel>=0.8,<0.9'), or leave it at false")


def has_liger_kernels(config: PretrainedConfig, trust_remote_code: bool = False) -> bool:
    """Whether `apply_liger` would find what it needs in a causal LM of this configuration."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError:
        # A kind that transformers has no causal LM for, or code that it may not run.
        return False
    return all(_modules_of(model))


def apply_liger(model: PreTrainedModel) -> None:
    """Let RMS norms and gated MLPs of `model` run Liger's kernels. Other models in the process keep their own.

    Liger's own `apply_liger_kernel_to_*` would also change transformers' classes, and so every model built later.

    Raises:
        UserError: the model has no such modules.
    """
    norms, mlps = _modules_of(model)
    if not norms or not mlps:
        raise UserError(f"{KEY}=true knows no kernels for {type(model).__name__}; set it to false")
    for norm in norms:
        norm.forward = MethodType(_rms_norm, norm)
    for mlp in mlps:
        mlp.forward = MethodType(_swiglu, mlp)


def _modules_of(model: PreTrainedModel) -> tuple[list[nn.Module], list[nn.Module]]:
    """The RMS norms and the gated MLPs."""
    modules, parts = list(model.modules()), ("gate_proj", "up_proj", "down_proj")
    norms = [m for m in modules if type(m).__name__.endswith("RMSNorm") and hasattr(m, "variance_epsilon")]
    is_silu = getattr(model.config, "hidden_act", None) == "silu"
    return norms, [m for m in modules if is_silu and all(hasattr(m, part) for part in parts)]


def _rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    # Not in place: the residual branch goes on using the gradient that the kernel would overwrite.
    return liger_rms_norm(hidden_states, self.weight, self.variance_epsilon, in_place=False)


def _swiglu(self: Any, hidden_states: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return self.down_proj(liger_swiglu(self.gate_proj(hidden_states), self.up_proj(hidden_states)))
