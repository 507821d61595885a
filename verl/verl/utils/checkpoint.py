"""Sharded checkpoints of one training process group (`global_step_N/actor/`), loadable at another world size.

    actor/
      *.distcp .metadata     model, both optimisers and both schedules (torch.distributed.checkpoint)
      rng_rank_R.pt          random states of rank R
      huggingface/           config, tokenizer and sprm_config.json, for the model merger

Model keys in it are `model.lm.<Hugging Face name>` and `model.score_head.*`. Saving fills the folder that the caller
names, and returns when every byte of this rank is on the disk; the caller makes the step folder visible at once (a
rename, after all ranks are done).
"""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedTokenizerBase

from verl.utils.fsdp import reshard
from verl.utils.optim import JointOptimizer
from verl.workers.actor.joint_model import JointModel
from xbai.errors import UserError
from xbai.files import atomic_write, fsync_tree
from xbai.sprm import SPRMConfig
from xbai.sprm.head import SPRM_CONFIG_FILE

logger = logging.getLogger(__name__)

HUGGINGFACE_FOLDER = "huggingface"


def save_checkpoint(
    folder: str | Path,
    model: JointModel,
    optimizer: JointOptimizer,
    tokenizer: PreTrainedTokenizerBase,
    sprm_config: SPRMConfig | None = None,
) -> None:
    """Write everything that training needs to go on. A collective.

    Args:
        folder: `.../actor`, in a step folder that is not yet visible under its final name.
        model, optimizer: of this rank.
        tokenizer, sprm_config: travel with the weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    reshard(model)
    dcp.save(_state_dict(model, optimizer), storage_writer=dcp.FileSystemWriter(folder, sync_files=True))
    with atomic_write(_rng_path(folder, dist.get_rank())) as stream:
        torch.save({"world_size": dist.get_world_size(), **rng_state()}, stream)
    if dist.get_rank() == 0:
        _save_huggingface_files(folder / HUGGINGFACE_FOLDER, model, tokenizer, sprm_config)
    dist.barrier()


def load_checkpoint(
    folder: str | Path, model: JointModel, optimizer: JointOptimizer, *, load_optimizer: bool = True, seed: int = 0
) -> None:
    """Restore what `save_checkpoint` wrote, in place. A collective.

    Args:
        folder: `.../global_step_N/actor`.
        model, optimizer: built and sharded as for a new run.
        load_optimizer: false (`optim.no_load_optim`) leaves optimisers and schedules as they are.
        seed: for the random states, when the checkpoint was written by another number of ranks.

    Raises:
        UserError: no checkpoint in the folder.
    """
    folder = Path(folder)
    if not (folder / ".metadata").exists():
        raise UserError(f"{folder}: no checkpoint here (no .metadata); resume from a global_step_N folder that has one")
    reshard(model)
    state = _state_dict(model, optimizer if load_optimizer else None)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    if load_optimizer:
        for name, part in optimizer.optimizers.items():
            set_optimizer_state_dict(model, part, optim_state_dict=state[f"{name}_optimizer"])
        for name, schedule in optimizer.schedules.items():
            schedule.load_state_dict(state[f"{name}_schedule"])
    _load_rng(folder, seed)


def rng_state() -> dict[str, Any]:
    """Random states of this process: python, numpy, torch and its GPU."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _state_dict(model: JointModel, optimizer: JointOptimizer | None) -> dict[str, Any]:
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        for name, part in optimizer.optimizers.items():
            state[f"{name}_optimizer"] = get_optimizer_state_dict(model, part)
        for name, schedule in optimizer.schedules.items():
            state[f"{name}_schedule"] = schedule.state_dict()
    return state


def _rng_path(folder: Path, rank: int) -> Path:
    return folder / f"rng_rank_{rank}.pt"


def _load_rng(folder: Path, seed: int) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    saved_by = torch.load(_rng_path(folder, 0), weights_only=False)["world_size"]
    if saved_by == world_size:
        set_rng_state(torch.load(_rng_path(folder, rank), weights_only=False))
        return
    logger.warning(
        "%s was written by %d ranks, now there are %d: random states start anew", folder, saved_by, world_size
    )
    random.seed(seed + rank)
    np.random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def _save_huggingface_files(
    folder: Path, model: JointModel, tokenizer: PreTrainedTokenizerBase, sprm_config: SPRMConfig | None
) -> None:
    model.lm.config.save_pretrained(folder)
    if model.lm.can_generate():
        model.lm.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if sprm_config is not None:
        with atomic_write(folder / SPRM_CONFIG_FILE, "w") as stream:
            json.dump(sprm_config.to_dict(), stream, indent=2)
    fsync_tree(folder)
