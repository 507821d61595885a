"""The worker base of what is trained and saved: policy and critic."""

from __future__ import annotations

from functools import partial

from torch import nn

from verl.checkpoints.state import BackgroundSaves, load_checkpoint, save_checkpoint, try_saving
from verl.optim.optimizers import Optimizers
from verl.single_controller import RayWorkerGroup, Worker, each
from verl.workers.phase_profiler import PHASE_PROFILER
from verl.workers.placed_model import PlacedModel
from xbai.model_files import ModelFiles
from xbai.sprm import SPRMConfig


class CheckpointedWorker(Worker):
    """A worker with one trained model, which a subclass hands over by `_keep_checkpoints_of`."""

    def _keep_checkpoints_of(
        self,
        trained: PlacedModel[nn.Module, Optimizers],
        files: ModelFiles,
        sprm_config: SPRMConfig | None = None,
        *,
        load_optimizer: bool = True,
        seed: int = 0,
    ) -> None:
        """Prepare for saving. A collective; arguments as of `verl.checkpoints.state`'s functions."""
        self._trained, self._travels_along = trained, (files, sprm_config)
        self._load = partial(load_checkpoint, load_optimizer=load_optimizer, seed=seed)
        self._background_saves = BackgroundSaves()

    def trace_phases(self, folder: str | None) -> None:
        """Trace the phases that follow into `folder`, or with None no more; see `PhaseProfiler`."""
        PHASE_PROFILER.trace(None if folder is None else f"{folder}/rank_{self.rank}_")

    def try_saving(self, folder: str) -> int:
        """Write all of this group's part of a checkpoint but the weights; returns how many bytes those take.

        Raises:
            UserError: it could not be written.
        """
        try_saving(folder, *self._travels_along)
        return sum(parameter.nbytes for parameter in self._trained.model.parameters() if parameter.requires_grad)

    def save_checkpoint(self, folder: str, background: bool = False) -> None:
        """Write this group's part of a checkpoint; with `background` only copy it, and write the copy meanwhile.

        Raises:
            UserError: it could not be written.
        """
        save = self._background_saves.start if background else save_checkpoint
        with self._trained.on_device(with_optimizer=True):
            save(folder, self._trained.model, self._trained.optimizer, *self._travels_along)

    def checkpoint_is_written(self) -> bool:
        """Whether the save in the background is done; does not wait.

        Raises:
            UserError: it could not be written.
        """
        return self._background_saves.is_done()

    def load_checkpoint(self, folder: str) -> None:
        """Go on from what `save_checkpoint` wrote.

        Raises:
            UserError: no checkpoint in the folder.
        """
        with self._trained.on_device(with_optimizer=True):
            self._load(folder, self._trained.model, self._trained.optimizer)


class CheckpointedWorkers(RayWorkerGroup):
    """A group of such workers, as the driver calls it."""

    trace_phases = each(CheckpointedWorker.trace_phases)
    try_saving = each(CheckpointedWorker.try_saving)
    save_checkpoint = each(CheckpointedWorker.save_checkpoint)
    checkpoint_is_written = each(CheckpointedWorker.checkpoint_is_written)
    load_checkpoint = each(CheckpointedWorker.load_checkpoint)
