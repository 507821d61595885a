"""What this machine's hardware and packages can do of what a configuration asks for, and what `auto` means here."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Literal

import torch

from verl.models.liger import check_liger, has_liger_kernels
from verl.optim.eight_bit_adam import EIGHT_BIT_OPTIMIZERS, check_eight_bit
from verl.trainer.config.fields import Missing, told, value_at, with_values
from verl.trainer.config.schema import PPOConfig, RayInit, TrainerConfig
from verl.trainer.planning.memory_estimate import GIB
from verl.trainer.planning.memory_phases import PhaseMemory
from verl.trainer.planning.model_shapes import config_of
from verl.utils.compiler import check_compiler
from xbai.errors import UserError

MODEL = "actor_rollout_ref.model"
CHECKPOINTING = "enable_gradient_checkpointing"
SMALL = (
    "to run small on CPU: trainer.device=cpu trainer.n_gpus_per_node=2 with a tiny model, as scripts/quickstart.sh does"
)


def on_cluster(trainer: TrainerConfig) -> bool:
    """Whether the run is on a Ray cluster, whose other machines Ray alone knows."""
    return trainer.nnodes > 1 or bool(os.environ.get("RAY_ADDRESS"))


def device_here(trainer: TrainerConfig) -> Literal["cuda", "cpu"]:
    """`trainer.device`, or what `auto` means on this machine."""
    if trainer.device != "auto":
        return trainer.device
    return "cuda" if on_cluster(trainer) or torch.cuda.device_count() else "cpu"


def machine_mistakes(trainer: TrainerConfig, ray_init: RayInit) -> Iterator[str]:
    """A line, if there are more processes than this machine has room for, or what cannot act on a cluster."""
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    wanted, separate = trainer.n_gpus_per_node + trainer.rollout_gpus_per_node, trainer.rollout_gpus_per_node
    key = f"trainer.n_gpus_per_node={trainer.n_gpus_per_node}"
    if separate:
        key += f" with trainer.rollout_gpus={trainer.rollout_gpus}"
    is_auto, is_cluster = trainer.device == "auto", on_cluster(trainer)
    if is_auto and is_cluster and not gpus:
        yield (
            "trainer.device=auto looks at this machine only, which has no GPU; for the cluster (trainer.nnodes, "
            "RAY_ADDRESS) set it to cuda or cpu"
        )
    elif is_auto and not gpus and wanted > cores:
        yield f"{key} needs {wanted} GPUs a machine; this one has none, and {cores} CPU cores; {SMALL}"
    elif device_here(trainer) == "cuda" and not is_cluster and gpus < wanted:
        less = f"set trainer.n_gpus_per_node={gpus - separate}, or " if gpus > separate else ""
        yield f"{key} needs {wanted} GPUs; this machine has {gpus or 'none'}; {less}{SMALL}"
    if ray_init.num_cpus is not None and is_cluster:
        yield f"ray_init.num_cpus={ray_init.num_cpus} cannot act on a Ray cluster that runs already"


def missing_kernels(config: PPOConfig) -> Iterator[Missing]:
    """What optimisers and kernels need and this machine lacks; `trainer.device` is cuda or cpu."""
    device, root = config.trainer.device, config.actor_rollout_ref
    for key in ("actor_rollout_ref.actor.optim.name", "actor_rollout_ref.score.optim.name", "critic.optim.name"):
        if (optim := value_at(config, key)) in EIGHT_BIT_OPTIMIZERS:
            yield from map(Missing, told(check_eight_bit, optim, device, key))
    if root.model.use_liger is True:
        yield from map(Missing, told(check_liger, device, "actor_rollout_ref.model.use_liger"))
    for key in ("use_fused_kernels", "use_torch_compile"):
        if getattr(root.model, key) is True:
            yield from map(Missing, told(check_compiler, f"actor_rollout_ref.model.{key}=true", device))


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


Choice = tuple[bool, str]
"""What `auto` means, and why."""


def resolve_auto(config: PPOConfig, gpu_bytes: float | None) -> tuple[PPOConfig, list[str]]:
    """Replace every `auto` by what it means on this machine, which all others of a cluster are taken to be like.

    `gpu_bytes` is the memory of a GPU; None where the driver has none to look at.

    Returns:
        The configuration without `auto`, and a line for each key that was: its value and the reason.
    """
    config, lines = resolve(config, KERNELS | {CHECKPOINTING: partial(_checkpointing, gpu_bytes=gpu_bytes)})
    if config.critic.model.enable_gradient_checkpointing == "auto":
        policys = config.actor_rollout_ref.model.enable_gradient_checkpointing
        config = with_values(config, {f"critic.model.{CHECKPOINTING}": policys})
    return config, lines


def resolve(config: PPOConfig, meanings: Mapping[str, Callable[[PPOConfig], Choice]]) -> tuple[PPOConfig, list[str]]:
    """`resolve_auto` of some keys; for those of `KERNELS` the GPU's memory does not matter."""
    chosen: dict[str, bool] = {}
    lines: list[str] = []
    for name, meaning in meanings.items():
        if getattr(config.actor_rollout_ref.model, name) == "auto":
            key = f"{MODEL}.{name}"
            chosen[key], reason = meaning(config)
            lines.append(f"{key}=auto: {str(chosen[key]).lower()} ({reason})")
    return with_values(config, chosen), lines


def _checkpointing(config: PPOConfig, gpu_bytes: float | None) -> Choice:
    if config.trainer.device == "cpu":
        return True, "as always on CPU"
    if gpu_bytes is None:
        return True, "the driver has no GPU whose memory it could look at"
    memory = PhaseMemory.from_config(config, gpu_bytes)
    if memory is None:
        return True, "there is no memory estimate for this model"
    phase, needed = memory.without_checkpointing
    fits = "does not fit" if memory.checkpointing else "fits"
    gib = f"{needed / GIB:.1f} GiB, which {fits} a GPU of {gpu_bytes / GIB:.1f} with room to spare"
    return memory.checkpointing, f"without it the {phase} takes {gib}"


def _liger(config: PPOConfig) -> Choice:
    if config.trainer.device == "cpu":
        return False, "its kernels need a GPU"
    if config.actor_rollout_ref.model.use_torch_compile:
        return False, "use_torch_compile makes kernels of the same operations"
    if any(told(check_liger, config.trainer.device)):
        return False, "liger-kernel is not installed: pip install -e 'verl[liger]'"
    model = config.actor_rollout_ref.model
    found = config_of(model.path, model.trust_remote_code)
    if found is None or not has_liger_kernels(found, model.trust_remote_code):
        return False, f"no kernels are known for {'this model' if found is None else found.model_type}"
    return True, f"liger-kernel {importlib.metadata.version('liger-kernel')} is installed"


def _fused_kernels(config: PPOConfig) -> Choice:
    if config.trainer.device == "cpu":
        return False, "compiling takes longer than it saves on CPU"
    if mistake := next(told(check_compiler, "it", config.trainer.device), None):
        return False, mistake.partition("; ")[0]
    return True, "a compiler and triton are here"


KERNELS: dict[str, Callable[[PPOConfig], Choice]] = {"use_liger": _liger, "use_fused_kernels": _fused_kernels}
