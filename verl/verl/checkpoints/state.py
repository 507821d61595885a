"""Sharded checkpoints of one training process group (`global_step_N/{actor,critic}/`), loadable at another world size.

    actor/
      *.distcp .metadata     model, optimisers, schedules and each rank's random states (torch.distributed.checkpoint);
                             mean and deviation by which a score head was standardised; of a frozen base nothing
      huggingface/           config, tokenizer and sprm_config.json, for the model merger
      checkpoint.sha256      sums of all these files, which are checked before anything of them is read

Model keys in it are `model.<name in the module>`, so the policy's `model.lm.<Hugging Face name>` and
`model.score_head.*`. Saving fills the folder that the caller names; when every rank's bytes are on the disk, the caller
makes the step folder visible at once (a rename). The sums are written last of all.
"""

from __future__ import annotations

import io
import logging
import random
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from verl.checkpoints.checksums import check_together
from verl.checkpoints.rng_state import load_with_rng, rng_state, set_rng_state
from verl.checkpoints.storage import METADATA_FILE, HashingWriter, load_state, read_metadata
from verl.models.fsdp import reshard
from verl.optim.optimizers import Optimizers
from verl.utils.first_rank import check_on_all_ranks
from xbai.engine.scorer import HEAD_PREFIX
from xbai.errors import UserError
from xbai.files import fsync_tree, why_not_written
from xbai.model_files import ModelFiles
from xbai.sprm import ScoreHead, SPRMConfig, Standardization
from xbai.sprm.head import save_sprm_config

logger = logging.getLogger(__name__)

HUGGINGFACE_FOLDER = "huggingface"
STANDARDIZATION = "score_standardization"


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: Optimizers,
    files: ModelFiles,
    sprm_config: SPRMConfig | None = None,
) -> None:
    """Write everything that training needs to go on; returns when all ranks' bytes are on the disk. A collective.

    Args:
        folder: `.../actor`, in a step folder that is not yet visible under its final name.
        files, sprm_config: travel with the weights.

    Raises:
        UserError: the disk is full, or a rank could not write for another reason; on every rank.
    """
    _save(_everything(model, optimizer), folder, files, sprm_config)


def try_saving(folder: str | Path, files: ModelFiles, sprm_config: SPRMConfig | None = None) -> None:
    """Write a checkpoint without weights: what would fail at the first real one fails here. A collective.

    Arguments and errors as of `save_checkpoint`.
    """
    _save(_random_states(), folder, files, sprm_config)


class BackgroundSaves:
    """`save_checkpoint` that returns once the state is copied to CPU memory, and writes the copy during training.

    Costs CPU memory for this rank's weights and optimiser states, pinned on a GPU machine and kept for the next save.
    Of what is offloaded in between, and so lies elsewhere, it is freed when it is written, and pinned anew.
    One save at a time: `is_done` must have said so before the next.
    """

    def __init__(self) -> None:
        on_gpu = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=on_gpu,
            )
        )
        # Training's own collectives must never meet those of the writing thread.
        self._group = dist.new_group(backend="gloo")
        self._save: tuple[Future[None], Path] | None = None

    def start(
        self,
        folder: str | Path,
        model: nn.Module,
        optimizer: Optimizers,
        files: ModelFiles,
        sprm_config: SPRMConfig | None = None,
    ) -> None:
        """Copy the state and begin to write it; arguments as `save_checkpoint`. A collective."""
        saving = dcp.async_save(
            _everything(model, optimizer),
            storage_writer=_Writer(folder, files, sprm_config),
            process_group=self._group,
            async_stager=self._stager,
        )
        self._save = (saving if isinstance(saving, Future) else saving.upload_completion), Path(folder)

    def is_done(self) -> bool:
        """Whether all ranks' bytes are on the disk; a `UserError` on every rank where one could not write."""
        if self._save is None:
            return True
        save, folder = self._save
        if not save.done():
            return False
        self._save = None
        try:
            save.result()
        except CheckpointException as error:
            raise _not_saved(folder, error) from error
        return True


def load_checkpoint(
    folder: str | Path, model: nn.Module, optimizer: Optimizers, *, load_optimizer: bool = True, seed: int = 0
) -> None:
    """Restore what `save_checkpoint` wrote into a model and optimisers built as for a new run. A collective.

    Moments and the place in the schedules come from the checkpoint; learning rates and other settings of the
    optimisers are the configuration's, so that a run can go on with others.

    Args:
        folder: `.../global_step_N/actor`.
        load_optimizer: false (`optim.no_load_optim`) leaves optimisers and schedules as they are.
        seed: for the random states, when the checkpoint was written by another number of ranks.

    Raises:
        UserError: no checkpoint in the folder, one of another model, or one that is damaged; on every rank.
    """
    folder = Path(folder)
    if not (folder / METADATA_FILE).exists():
        raise UserError(f"{folder}: no checkpoint here (no .metadata); resume from a global_step_N folder that has one")
    check_together(folder)
    reshard(model)
    saved = read_metadata(folder).state_dict_metadata
    if f"{STANDARDIZATION}.mean" in saved:
        head = getattr(model, "score_head", None)
        if not isinstance(head, ScoreHead):
            raise UserError(f"{folder}: the checkpoint does not fit this model, which has no score head")
        zeros = torch.zeros(head.hidden_size, dtype=torch.float64)
        head.standardization = Standardization(zeros, zeros.clone())
    state = _state(model, optimizer if load_optimizer else None)
    saved_by = sum(key.startswith("rng.") for key in saved)
    if saved_by == dist.get_world_size():
        state["rng"] = {_rank_key(): b""}
    try:
        load_state(state, folder)
    except CheckpointException as error:
        raise UserError(f"{folder}: the checkpoint does not fit this model: {_reason(error)}") from error
    check_on_all_ranks(lambda: _check_head(folder, state["model"]))
    # What is frozen is in no checkpoint; `load_state` has missed nothing else.
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))
    if load_optimizer:
        for name, part in optimizer.optimizers.items():
            _load_optimizer(model, part, state[f"{name}_optimizer"])
            _load_schedule(name, optimizer.schedules[name], state[f"{name}_schedule"])
    if "rng" in state:
        set_rng_state(load_with_rng(io.BytesIO(state["rng"][_rank_key()]), f"{folder}: rng.{_rank_key()}"))
    else:
        _seed_anew(folder, saved_by, seed)


def _check_head(folder: Path, weights: dict[str, Any]) -> None:
    """Refuse a score head that is not finite, which would give each step the same score, or none."""
    for name, weight in weights.items():
        part = weight.to_local() if isinstance(weight, DTensor) else weight
        if name.startswith(HEAD_PREFIX) and not part.isfinite().all():
            raise UserError(f"{folder}: {name} holds weights that are not finite; resume from an earlier checkpoint")


class _Writer(HashingWriter):
    """Also writes the Hugging Face files, on rank 0, as a part of the save: where they fail, it fails on every rank."""

    def __init__(self, folder: str | Path, files: ModelFiles, sprm_config: SPRMConfig | None) -> None:
        super().__init__(folder)
        self._model_files, self._sprm_config = files, sprm_config

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        folder = Path(self.path) / HUGGINGFACE_FOLDER
        folder.mkdir(parents=True)
        self._model_files.write(folder)
        if self._sprm_config is not None:
            save_sprm_config(folder, self._sprm_config)
        fsync_tree(folder)
        super().finish(metadata, results)


def _save(state: dict[str, Any], folder: str | Path, files: ModelFiles, sprm_config: SPRMConfig | None) -> None:
    try:
        dcp.save(state, storage_writer=_Writer(folder, files, sprm_config))
    except CheckpointException as error:
        raise _not_saved(folder, error) from error


def _state(model: nn.Module, optimizer: Optimizers | None) -> dict[str, Any]:
    frozen = {name for name, weight in model.named_parameters(remove_duplicate=False) if not weight.requires_grad}
    trained = {name: weight for name, weight in get_model_state_dict(model).items() if name not in frozen}
    state: dict[str, Any] = {"model": trained}
    head = getattr(model, "score_head", None)
    if head is not None and head.standardization is not None:
        state[STANDARDIZATION] = head.standardization._asdict()
    if optimizer is not None:
        for name, part in optimizer.optimizers.items():
            state[f"{name}_optimizer"] = get_optimizer_state_dict(model, part)
        for name, schedule in optimizer.schedules.items():
            state[f"{name}_schedule"] = schedule.state_dict()
    return state


def _everything(model: nn.Module, optimizer: Optimizers) -> dict[str, Any]:
    reshard(model)
    return _state(model, optimizer) | _random_states()


def _random_states() -> dict[str, Any]:
    content = io.BytesIO()
    torch.save(rng_state(), content)
    return {"rng": {_rank_key(): content.getvalue()}}


def _rank_key() -> str:
    return f"rank_{dist.get_rank()}"


def _not_saved(folder: str | Path, error: CheckpointException) -> UserError:
    return UserError(f"{folder}: the checkpoint could not be written: {_reason(error)}")


def _reason(error: CheckpointException) -> str:
    """The first rank's failure, in one line."""
    rank, (failure, _) = min(error.failures.items())
    return f"rank {rank}: {why_not_written(failure)}"


def _load_optimizer(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    configured = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state)
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.update(settings)


def _load_schedule(name: str, schedule: LambdaLR, state: dict[str, Any]) -> None:
    configured = schedule.base_lrs
    if [float(rate) for rate in state["base_lrs"]] != [float(rate) for rate in configured]:
        logger.info("peak learning rate of %s: %s until now, %s from here on", name, state["base_lrs"], configured)
    schedule.load_state_dict({**state, "base_lrs": configured})
    for group, peak, factor in zip(schedule.optimizer.param_groups, configured, schedule.lr_lambdas, strict=True):
        rate = peak * factor(schedule.last_epoch)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


def _seed_anew(folder: Path, saved_by: int, seed: int) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    logger.warning(
        "%s was written by %d ranks, now there are %d: random states start anew", folder, saved_by, world_size
    )
    random.seed(seed + rank)
    np.random.seed(seed + rank)
    torch.manual_seed(seed + rank)
