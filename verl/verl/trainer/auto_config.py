"""What `auto` stands for: kernels that can run here, and checkpointing where the memory estimate asks for it."""

from __future__ import annotations

import importlib.metadata
from typing import NamedTuple

import torch
from omegaconf import DictConfig

from verl.trainer.memory_estimate import GIB
from verl.trainer.memory_phases import PhaseMemory
from verl.utils.compiler import check_compiler
from verl.utils.liger import check_liger, has_liger_kernels
from verl.utils.model_shapes import config_of
from xbai.errors import UserError

SECTION = "actor_rollout_ref.model"
KERNELS = ("use_liger", "use_fused_kernels")
CHECKPOINTING = "enable_gradient_checkpointing"
AUTO_KEYS = tuple(f"{SECTION}.{name}" for name in (*KERNELS, CHECKPOINTING))
"""Keys that are true, false or `auto`."""


class Choice(NamedTuple):
    """What `auto` means, and why."""

    value: bool
    reason: str


def resolve_auto(config: DictConfig, gpu_bytes: float | None) -> list[str]:
    """Replace every `auto` by what it means on this machine, which all others of a cluster are taken to be like.

    Args:
        config: checked by `check_config`, `trainer.device` resolved.
        gpu_bytes: memory of a GPU; None where the driver has none to look at.

    Returns:
        A line for each key that was `auto`: its value and the reason.
    """
    model, lines = config.actor_rollout_ref.model, resolve_kernels(config)
    if model[CHECKPOINTING] == "auto":
        choice = _checkpointing(config, gpu_bytes)
        model[CHECKPOINTING] = choice.value
        lines.append(_line(CHECKPOINTING, choice))
    return lines


def resolve_kernels(config: DictConfig) -> list[str]:
    """`resolve_auto` of the keys for which the GPU's memory does not matter."""
    model, lines = config.actor_rollout_ref.model, []
    for name, choose in zip(KERNELS, (_liger, _fused_kernels)):
        if model[name] == "auto":
            choice = choose(config)
            model[name] = choice.value
            lines.append(_line(name, choice))
    return lines


def smallest_gpu() -> float | None:
    """Bytes of memory of this machine's smallest GPU; None without one.

    Raises:
        UserError: a driver that torch cannot use.
    """
    try:
        return min(
            (torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())), default=None
        )
    except RuntimeError as error:
        raise UserError(f"torch cannot use this machine's GPUs: {str(error).splitlines()[0]}") from error


def _checkpointing(config: DictConfig, gpu_bytes: float | None) -> Choice:
    if config.trainer.device == "cpu":
        return Choice(True, "as always on CPU")
    if gpu_bytes is None:
        return Choice(True, "the driver has no GPU whose memory it could look at")
    memory = PhaseMemory.from_config(config, gpu_bytes)
    if memory is None:
        return Choice(True, "there is no memory estimate for this model")
    phase, needed = memory.without_checkpointing
    fits = "does not fit" if memory.checkpointing else "fits"
    gib = f"{needed / GIB:.1f} GiB, which {fits} a GPU of {gpu_bytes / GIB:.1f} with room to spare"
    return Choice(memory.checkpointing, f"without it the {phase} takes {gib}")


def _liger(config: DictConfig) -> Choice:
    if config.trainer.device == "cpu":
        return Choice(False, "its kernels need a GPU")
    if config.actor_rollout_ref.model.use_torch_compile:
        return Choice(False, "use_torch_compile makes kernels of the same operations")
    try:
        check_liger(config.trainer.device)
    except UserError:
        return Choice(False, "liger-kernel is not installed: pip install -e 'verl[liger]'")
    model = config.actor_rollout_ref.model
    found = config_of(model.path, model.trust_remote_code)
    if found is None or not has_liger_kernels(found, model.trust_remote_code):
        return Choice(False, f"no kernels are known for {'this model' if found is None else found.model_type}")
    return Choice(True, f"liger-kernel {importlib.metadata.version('liger-kernel')} is installed")


def _fused_kernels(config: DictConfig) -> Choice:
    if config.trainer.device == "cpu":
        return Choice(False, "compiling takes longer than it saves on CPU")
    try:
        check_compiler("it", config.trainer.device)
    except UserError as error:
        return Choice(False, str(error).partition("; ")[0])
    return Choice(True, "a compiler and triton are here")


def _line(name: str, choice: Choice) -> str:
    return f"{SECTION}.{name}=auto: {str(choice.value).lower()} ({choice.reason})"
