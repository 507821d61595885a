"""What this machine's hardware and packages can do of what a configuration asks for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Literal

import torch

from verl.models.liger import check_liger
from verl.optim.eight_bit_adam import EIGHT_BIT_OPTIMIZERS, check_eight_bit
from verl.trainer.config.fields import Missing, told
from verl.trainer.config.run import RayInit, TrainerConfig
from verl.trainer.config.schema import PPOConfig
from verl.utils.compiler import check_compiler
from xbai.errors import UserError

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
    gpus, cores, wanted = torch.cuda.device_count(), os.cpu_count() or 1, trainer.n_gpus_per_node
    is_auto, is_cluster = trainer.device == "auto", on_cluster(trainer)
    if is_auto and is_cluster and not gpus:
        yield (
            "trainer.device=auto looks at this machine only, which has no GPU; for the cluster (trainer.nnodes, "
            "RAY_ADDRESS) set it to cuda or cpu"
        )
    elif is_auto and not gpus and wanted > cores:
        yield (
            f"trainer.n_gpus_per_node={wanted} needs {wanted} GPUs a machine; this one has none, and {cores} CPU "
            f"cores; {SMALL}"
        )
    elif device_here(trainer) == "cuda" and not is_cluster and gpus < wanted:
        less = f"set trainer.n_gpus_per_node={gpus}, or " if gpus else ""
        yield (
            f"trainer.n_gpus_per_node={wanted} needs {wanted} GPUs; this machine has {gpus or 'none'}; {less}{SMALL}"
        )
    if ray_init.num_cpus is not None and is_cluster:
        yield f"ray_init.num_cpus={ray_init.num_cpus} cannot act on a Ray cluster that runs already"


def missing_kernels(config: PPOConfig) -> Iterator[Missing]:
    """What optimisers and kernels need and this machine lacks; `trainer.device` is cuda or cpu."""
    device, root = config.trainer.device, config.actor_rollout_ref
    for name, optim in (
        ("actor_rollout_ref.actor.optim", root.actor.optim),
        ("actor_rollout_ref.score.optim", root.score.optim),
        ("critic.optim", config.critic.optim),
    ):
        if optim.name in EIGHT_BIT_OPTIMIZERS:
            yield from map(Missing, told(check_eight_bit, optim.name, device, f"{name}.name"))
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
