"""What of a supervised run outlives its process: the checkpoint it goes on from, and those it writes."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from verl.checkpoints.folder import CheckpointFolder, read_state, step_of, write_state
from verl.checkpoints.state import load_checkpoint, save_checkpoint, try_saving
from verl.models.joint_model import JointModel
from verl.optim.optimizers import Optimizers
from verl.trainer.config.sft import SFTConfig
from verl.trainer.sft.metrics_window import WindowTotals
from verl.trainer.sft.run_identity import what_changed, what_forbids_going_on
from verl.utils.first_rank import on_first_rank
from xbai.errors import UserError
from xbai.files import check_room
from xbai.model_files import ModelFiles
from xbai.sprm import SPRMConfig

logger = logging.getLogger(__name__)

ANEW = "start anew with trainer.resume_mode=disable"


class RunState:
    """Finds the checkpoint to go on from, restores it, and writes new ones. The methods are collectives.

    A checkpoint is laid out as one of the RL trainer, `global_step_N/{actor/,data.pt}`: the model merger reads it.

    Attributes:
        checkpoint: the one to go on from; None for a new run.
        step: of that checkpoint, or 0.
        window: what was measured up to it and not yet logged; None for a new run.

    Raises:
        UserError: a checkpoint that is not there or does not fit the run.
    """

    def __init__(
        self, config: SFTConfig, identity: dict[str, Any], files: ModelFiles, sprm_config: SPRMConfig | None
    ) -> None:
        self._config, self._identity, self._travels_along = config, identity, (files, sprm_config)
        # Ranks on other nodes may work in other folders.
        folder = on_first_rank(lambda: Path(config.trainer.default_local_dir).absolute())
        self._folder = CheckpointFolder(folder, config.trainer.max_ckpt_to_keep)
        self.checkpoint, self.window = on_first_rank(self._find)
        self.step = 0 if self.checkpoint is None else step_of(self.checkpoint)

    def try_saving(self, checkpoint_bytes: int) -> None:
        """Write everything of a checkpoint but weights and optimiser, and remove it: what would fail later fails here.

        A whole one takes `checkpoint_bytes`.

        Raises:
            UserError: a folder that cannot be written, has no room, or is not the same for all ranks.
        """
        on_first_rank(lambda: self._folder.prepare(self.checkpoint))
        if self._config.trainer.save_freq <= 0:
            return
        with self._written_by_all(self._folder.rehearse(), "no checkpoint can be written") as folder:
            _check_that_all_see(folder)
            self._write_state(folder, 0, None)
            try_saving(folder / "actor", *self._travels_along)
            on_first_rank(lambda: check_room(folder, checkpoint_bytes))

    def restore(self, model: JointModel, optimizer: Optimizers) -> None:
        """Put weights, moments, schedules and random states where they were, if there is a checkpoint."""
        if self.checkpoint is None:
            return
        load_checkpoint(self.checkpoint / "actor", model, optimizer, seed=self._config.trainer.seed)
        total = self._identity["settings"]["trainer.total_training_steps"]
        logger.info("going on from %s: step %d of %d is done", self.checkpoint, self.step, total)

    def save(self, step: int, window: WindowTotals, model: JointModel, optimizer: Optimizers) -> None:
        """Write the checkpoint after `step`; returns when it is on the disk.

        Raises:
            UserError: it could not be written.
        """
        start = time.perf_counter()
        with self._written_by_all(self._folder.write(step), f"the checkpoint of step {step} was not saved") as folder:
            self._write_state(folder, step, window)
            save_checkpoint(folder / "actor", model, optimizer, *self._travels_along)
        on_first_rank(self._folder.drop_old)
        logger.info("saved %s in %.1f s", self._folder.step_folder(step), time.perf_counter() - start)

    @contextmanager
    def _written_by_all(self, opening: AbstractContextManager[Path], failed: str) -> Iterator[Path]:
        """A folder that rank 0 opens and, when every rank has written its part, closes."""
        with ExitStack() as of_first_rank:
            try:
                yield on_first_rank(lambda: of_first_rank.enter_context(opening))
                on_first_rank(of_first_rank.close)
            except UserError as error:
                raise UserError(f"trainer.default_local_dir={self._folder.folder}: {failed} ({error})") from error

    def _write_state(self, folder: Path, step: int, window: WindowTotals | None) -> None:
        state = {"step": step, "identity": self._identity, "window": None if window is None else window._asdict()}
        on_first_rank(lambda: write_state(state, folder))

    def _find(self) -> tuple[Path | None, WindowTotals | None]:
        trainer = self._config.trainer
        found = self._folder.find(trainer.resume_mode, trainer.resume_from_path)
        if found is None:
            return None, None
        checkpoint = found.absolute()
        state = read_state(checkpoint)
        if "identity" not in state:
            raise UserError(f"{checkpoint} was not written by supervised fine-tuning; {ANEW}")
        self._check(checkpoint, state["identity"])
        return checkpoint, WindowTotals(**state["window"])

    def _check(self, checkpoint: Path, then: dict[str, Any]) -> None:
        if changes := what_forbids_going_on(then, self._identity, self._config.model.path):
            raise UserError(f"{changes[0]} since {checkpoint} was written; put that back, or {ANEW}")
        step, total = step_of(checkpoint), self._identity["settings"]["trainer.total_training_steps"]
        if step > total:
            raise UserError(
                f"{checkpoint} is further than the {total} steps of this run (trainer.total_training_steps, or else "
                f"trainer.total_epochs); raise that, or {ANEW}"
            )
        for change in what_changed(then, self._identity):
            logger.warning("%s since %s was written", change, checkpoint)


def _check_that_all_see(folder: Path) -> None:
    """Raise a `UserError` unless every rank sees the folder that rank 0 has made. A collective."""
    seen: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, None if folder.is_dir() else socket.gethostname())
    if blind := sorted({host for host in seen if host is not None}):
        raise UserError(f"{', '.join(blind)} does not see what rank 0 writes there; all nodes must share the folder")
