"""What `auto` stands for: kernels that can run here, and checkpointing where the memory estimate asks for it."""

from __future__ import annotations

import importlib.metadata
from typing import NamedTuple

from verl.models.liger import check_liger, has_liger_kernels
from verl.trainer.config.fields import with_values
from verl.trainer.config.schema import PPOConfig
from verl.trainer.planning.memory_estimate import GIB
from verl.trainer.planning.memory_phases import PhaseMemory
from verl.trainer.planning.model_shapes import config_of
from verl.utils.compiler import check_compiler
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


def resolve_auto(config: PPOConfig, gpu_bytes: float | None) -> tuple[PPOConfig, list[str]]:
    """Replace every `auto` by what it means on this machine, which all others of a cluster are taken to be like.

    Args:
        config: from `check_config`.
        gpu_bytes: memory of a GPU; None where the driver has none to look at.

    Returns:
        The configuration without `auto`, and a line for each key that was: its value and the reason.
    """
    config, lines = resolve_kernels(config)
    chosen: dict[str, bool] = {}
    policys = config.actor_rollout_ref.model.enable_gradient_checkpointing
    if policys == "auto":
        choice = _checkpointing(config, gpu_bytes)
        chosen[f"{SECTION}.{CHECKPOINTING}"] = policys = choice.value
        lines.append(_line(CHECKPOINTING, choice))
    if config.critic.model.enable_gradient_checkpointing == "auto":
        chosen[f"critic.model.{CHECKPOINTING}"] = policys
    return with_values(config, chosen), lines


def resolve_kernels(config: PPOConfig) -> tuple[PPOConfig, list[str]]:
    """`resolve_auto` of the keys for which the GPU's memory does not matter."""
    chosen: dict[str, bool] = {}
    lines: list[str] = []
    for name, choose in zip(KERNELS, (_liger, _fused_kernels), strict=True):
        if getattr(config.actor_rollout_ref.model, name) == "auto":
            choice = choose(config)
            chosen[f"{SECTION}.{name}"] = choice.value
            lines.append(_line(name, choice))
    return with_values(config, chosen), lines


def _checkpointing(config: PPOConfig, gpu_bytes: float | None) -> Choice:
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


def _liger(config: PPOConfig) -> Choice:
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


def _fused_kernels(config: PPOConfig) -> Choice:
    if config.trainer.device == "cpu":
        return Choice(False, "compiling takes longer than it saves on CPU")
    try:
        check_compiler("it", config.trainer.device)
    except UserError as error:
        return Choice(False, str(error).partition("; ")[0])
    return Choice(True, "a compiler and triton are here")


def _line(name: str, choice: Choice) -> str:
    return f"{SECTION}.{name}=auto: {str(choice.value).lower()} ({choice.reason})"
