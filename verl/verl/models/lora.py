"""LoRA (arXiv:2106.09685): low-rank adapters beside the linear layers of a frozen base, in peft's modules.

An adapted layer computes W x + (alpha / rank) B A x. B begins as zeros, so that the model begins as its base.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from peft import LoraConfig

    from verl.trainer.config.schema import ModelConfig

ALL_LINEAR = "all-linear"
ADAPTER = "default"
"""What peft calls an adapter that nobody named."""
ADAPTER_SEED = 0
_ADAPTER_WEIGHT = re.compile(rf".+\.lora_[AB]\.{ADAPTER}\.weight")
_BASE_LAYER = ".base_layer."


def lora_config(model: ModelConfig) -> LoraConfig | None:
    """Of the adapters that a configuration asks for; None without any."""
    if not model.lora_rank:
        return None
    # Takes seconds to import, and few runs have adapters.
    from peft import LoraConfig

    return LoraConfig(
        r=model.lora_rank,
        lora_alpha=model.lora_alpha,
        target_modules=target_modules(model),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(model.path).resolve()),
    )


def target_modules(model: ModelConfig) -> str | list[str]:
    """Which linear layers have adapters: `ALL_LINEAR` of the decoder layers, or those with one of these last names."""
    chosen = model.target_modules
    return [chosen] if isinstance(chosen, str) and chosen != ALL_LINEAR else chosen


def add_adapters(lm: PreTrainedModel, config: LoraConfig, dtype: torch.dtype = torch.float32) -> None:
    """Freeze a causal LM and put adapters in `dtype` beside its linear layers, in place, alike on every rank."""
    from peft import inject_adapter_in_model

    lm.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ADAPTER_SEED)
        # peft writes into the configuration what it finds.
        inject_adapter_in_model(deepcopy(config), lm, ADAPTER)
    for name, parameter in lm.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.to(dtype)


def is_adapter(name: str) -> bool:
    """Whether a parameter is of an adapter, by its name."""
    return _ADAPTER_WEIGHT.fullmatch(name) is not None


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Have a model compute as its base does inside; one without adapters always does.

    peft's own switch also sets `requires_grad`, which FSDP2 reads once, when it first gathers a weight: adapters that
    were first used switched off would never get a gradient.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """[out, in] W + scaling B A of [out, in], [rank, in] and [out, rank], in float32 at least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(wide) + scaling * (b.to(wide) @ a.to(wide))


def merged_parameters(model: nn.Module, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a model by their names in its base; an adapted one is the sum that its layer multiplies by.

    Such a sum is made on `device` when it is asked for, of a sharded model each rank's own rows. All others stay where
    they are. A collective where there are adapters.
    """
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        layer_name, is_adapted, weight = name.rpartition(_BASE_LAYER)
        if not is_adapted:
            yield name, parameter.detach()
        elif weight != "weight":
            yield f"{layer_name}.{weight}", parameter.detach()
        else:
            layer: Any = model.get_submodule(layer_name)
            factors = (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
            a, b = (factor.detach().to(device) for factor in factors)
            if isinstance(a, DTensor):
                a = a.redistribute(placements=[Replicate()] * a.device_mesh.ndim)
            yield f"{layer_name}.weight", merged_weight(parameter.detach().to(device), a, b, layer.scaling[ADAPTER])
