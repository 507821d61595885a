"""Checks of how models are placed and which kernels they run: `fsdp_config`, `optim.name`, `use_liger` and the like."""

from __future__ import annotations

from collections.abc import Callable

from omegaconf import DictConfig, OmegaConf

from verl.utils.compiler import check_compiler
from verl.utils.eight_bit_adam import EIGHT_BIT_OPTIMIZERS, check_eight_bit
from verl.utils.liger import check_liger
from verl.utils.model import trained_dtype
from xbai.errors import UserError

TRAINED = ("actor_rollout_ref.actor.fsdp_config", "critic.model.fsdp_config")
FSDP_CONFIGS = (
    *TRAINED,
    "actor_rollout_ref.ref.fsdp_config",
)
OPTIMS = ("actor_rollout_ref.actor.optim", "actor_rollout_ref.score.optim", "critic.optim")


def check_placement(config: DictConfig) -> None:
    """Raise a `UserError` for kernels that exclude each other, or for the first `fsdp_config` that contradicts itself
    or the number of processes, or in which nothing can be trained."""
    for name in TRAINED:
        for key in ("model_dtype", "compute_dtype"):
            if (dtype := OmegaConf.select(config, f"{name}.{key}")) is not None:
                trained_dtype(dtype, f"{name}.{key}")
    model = config.actor_rollout_ref.model
    if model.use_torch_compile and model.use_liger is True:
        raise UserError(
            "actor_rollout_ref.model: use_liger and use_torch_compile exclude each other (both are kernels of the same "
            "operations); set one of them to false"
        )
    processes = config.trainer.nnodes * config.trainer.n_gpus_per_node
    for name in FSDP_CONFIGS:
        section = OmegaConf.select(config, name)
        for key in ("param_offload", "optimizer_offload"):
            if section.offload_policy and section.get(key):
                raise UserError(
                    f"{name}: {key} and offload_policy exclude each other (offload_policy keeps weights and optimiser "
                    "in CPU memory at all times); set one of them to false"
                )
        size = section.fsdp_size
        if size == 0 or size < -1 or (size > 0 and processes % size):
            raise UserError(
                f"{name}.fsdp_size={size} must divide the {processes} processes (trainer.nnodes * "
                "trainer.n_gpus_per_node), or be -1 for all of them"
            )


def check_kernels(config: DictConfig, not_found: Callable[[str], None]) -> None:
    """Say what optimisers and kernels need and this machine lacks.

    Args:
        config: the trainer's whole configuration, `trainer.device` resolved.
        not_found: takes what is to be said.
    """
    device = config.trainer.device
    try:
        for name in OPTIMS:
            if (optimizer := OmegaConf.select(config, name).name) in EIGHT_BIT_OPTIMIZERS:
                check_eight_bit(optimizer, device, f"{name}.name")
        if config.actor_rollout_ref.model.use_liger is True:
            check_liger(device, "actor_rollout_ref.model.use_liger")
        for key in ("use_fused_kernels", "use_torch_compile"):
            if config.actor_rollout_ref.model[key] is True:
                check_compiler(f"actor_rollout_ref.model.{key}=true", device)
    except UserError as error:
        not_found(str(error))
