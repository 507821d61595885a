"""The model in a checkpoint on disk, tensor by tensor: what the merger reads, without a process group."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from verl.checkpoints.storage import METADATA_FILE, load_state, read_metadata
from verl.checkpoints.verl_shards import VerlShards, has_verl_shards
from xbai.errors import UserError, one_line

MODEL_PREFIX = "model."


class DistributedCheckpoint:
    """What `save_checkpoint` wrote into `.../global_step_N/actor`, by Hugging Face's names and `score_head.*`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Names, whole shapes and dtypes (on the meta device)."""
        entries = read_metadata(self._folder).state_dict_metadata
        return {
            _public_name(key): torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for key, entry in entries.items()
            if key.startswith(MODEL_PREFIX) and isinstance(entry, TensorStorageMetadata)
        }

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors; a `UserError` where a file of the checkpoint is damaged or missing."""
        tensors = {_key(name): torch.empty_like(self.tensors[name], device="cpu") for name in names}
        try:
            load_state(tensors, self._folder, no_dist=True)
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            why = f"{type(reason).__name__}: {one_line(reason)[:300]}"
            raise UserError(f"{self._folder}: the checkpoint cannot be read ({why})") from None
        return {_public_name(key): tensor for key, tensor in tensors.items()}


StoredModel = DistributedCheckpoint | VerlShards


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a model that `open_stored_model` reads."""
    return (folder / METADATA_FILE).is_file() or has_verl_shards(folder)


def open_stored_model(folder: Path) -> StoredModel:
    """The model of a folder for which `is_checkpoint` holds; errors as of `VerlShards`."""
    return DistributedCheckpoint(folder) if (folder / METADATA_FILE).is_file() else VerlShards(folder)


def _public_name(key: str) -> str:
    return key.removeprefix(MODEL_PREFIX).removeprefix("lm.")


def _key(name: str) -> str:
    return f"{MODEL_PREFIX}{name}" if name.startswith("score_head.") else f"{MODEL_PREFIX}lm.{name}"
