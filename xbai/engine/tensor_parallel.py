"""Among how many GPUs vLLM can divide a model's layers, by the content of its `config.json`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch

from xbai.errors import UserError

logger = logging.getLogger(__name__)

_DIVIDED = ("num_attention_heads", "intermediate_size", "num_key_value_heads")


def check_tensor_parallel_size(size: int, config: Mapping[str, Any], option: str) -> None:
    """Refuse what vLLM's workers would end on, each in a traceback of its own.

    Raises:
        UserError: heads, key/value heads or the MLP do not divide; it begins with `option`, what the user wrote.
    """
    if not _divides(size, config):
        heads, mlp, kv_heads = (config.get(name) for name in _DIVIDED)
        raise UserError(
            f"{option} must divide the model's num_attention_heads={heads} and intermediate_size={mlp}, and divide its "
            f"num_key_value_heads={kv_heads} or be a multiple of it"
        )


def largest_tensor_parallel_size(most: int, config: Mapping[str, Any]) -> int:
    """Of at most so many GPUs, one at least, how many can share the model."""
    return next(size for size in range(most, 0, -1) if _divides(size, config))


def visible_gpus_that_share(config: Mapping[str, Any]) -> int:
    """How many of the GPUs that CUDA_VISIBLE_DEVICES gives this process can share a model; one if unset."""
    visible = max(1, torch.cuda.device_count()) if "CUDA_VISIBLE_DEVICES" in os.environ else 1
    size = largest_tensor_parallel_size(visible, config)
    if size < visible:
        logger.warning(
            "%d of the %d GPUs in CUDA_VISIBLE_DEVICES share the model: its heads and MLP do not divide among more",
            size,
            visible,
        )
    return size


def _divides(size: int, config: Mapping[str, Any]) -> bool:
    heads, mlp, kv_heads = (config.get(name) for name in _DIVIDED)
    # Where there are fewer key/value heads than GPUs, several of these have the same.
    larger, smaller = max(size, kv_heads or size), min(size, kv_heads or size)
    return not ((heads or size) % size or (mlp or size) % size or larger % smaller)
