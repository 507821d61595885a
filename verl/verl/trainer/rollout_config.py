"""What a configuration asks of the rollout: how to sample, and what vLLM divides among ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from xbai.engine import SamplingParams
from xbai.engine.tensor_parallel import check_tensor_parallel_size
from xbai.errors import UserError

SECTION = "actor_rollout_ref.rollout"


def check_rollout(config: DictConfig, shape: Mapping[str, Any]) -> None:
    """Raise a `UserError` for the first key that is wrong or cannot act.

    Args:
        config: composed and resolved.
        shape: the model's config.json, as far as it is known.
    """
    rollout = config.actor_rollout_ref.rollout
    if rollout.mode == "async":
        raise UserError(
            f"{SECTION}.mode=async is for verl's agent loops, which this trainer does not have; use mode=sync"
        )
    if rollout.sleep_level != 2 and not rollout.free_cache_engine:
        raise UserError(
            f"{SECTION}.sleep_level={rollout.sleep_level} cannot act with free_cache_engine=false, with which the "
            "engine never sleeps"
        )
    if not 0 < (share := rollout.gpu_memory_utilization) <= 1:
        raise UserError(f"{SECTION}.gpu_memory_utilization={share} must be above 0 and at most 1")
    _check_sampling(SECTION, rollout)
    _check_sampling(f"{SECTION}.val_kwargs", rollout.val_kwargs)
    if rollout.tensor_model_parallel_size > 1:
        _check_tensor_parallel(rollout.tensor_model_parallel_size, config.trainer.n_gpus_per_node, shape)


def _check_sampling(name: str, section: DictConfig) -> None:
    try:
        SamplingParams(temperature=section.temperature, top_p=section.top_p, top_k=section.top_k)
    except UserError as error:
        raise UserError(f"{name}.{str(error).removeprefix('sampling: ')}") from None


def _check_tensor_parallel(size: int, ranks_of_node: int, shape: Mapping[str, Any]) -> None:
    key = f"{SECTION}.tensor_model_parallel_size={size}"
    if ranks_of_node % size:
        raise UserError(
            f"{key} must divide trainer.n_gpus_per_node={ranks_of_node}: ranks that share an engine are on one machine"
        )
    check_tensor_parallel_size(size, shape, key)
