"""The folder of a run's checkpoints: which one to go on from, writing the next, dropping old ones."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from xbai.errors import UserError
from xbai.files import atomic_directory, atomic_write

logger = logging.getLogger(__name__)

LATEST_FILE = "latest_checkpointed_iteration.txt"
TRAINER_STATE_FILE = "data.pt"


class CheckpointFolder:
    """`folder/global_step_N/{actor/,data.pt}`, with the step to resume from in `latest_checkpointed_iteration.txt`.

    A checkpoint is written under a temporary name and renamed when it is complete, and only then named as the latest:
    one with its final name is whole, and a run that died while saving goes on from the one before.

    Args:
        folder: `trainer.default_local_dir`.
        max_to_keep: how many checkpoints stay; None for all.
    """

    def __init__(self, folder: str | Path, max_to_keep: int | None = None) -> None:
        self.folder, self._max_to_keep = Path(folder), max_to_keep

    def step_folder(self, step: int) -> Path:
        """Where the checkpoint after `step` lies."""
        return self.folder / step_name(step)

    def find(self, resume_mode: str, resume_from_path: str | None) -> Path | None:
        """The checkpoint to go on from, or None for a new run.

        Raises:
            UserError: it is named but not there.
        """
        if resume_mode == "resume_path":
            return _checked(Path(resume_from_path), "trainer.resume_from_path")
        latest = self.folder / LATEST_FILE
        if resume_mode == "disable" or not latest.exists():
            return None
        return _checked(self.step_folder(int(latest.read_text())), str(latest))

    def prepare(self, resuming: bool) -> None:
        """Remove what killed saves left behind; a run that starts anew also forgets which checkpoint was the latest."""
        for leftover in self.folder.glob(".global_step_*.tmp"):
            logger.info("removing %s: a save that was interrupted", leftover)
            shutil.rmtree(leftover)
        latest = self.folder / LATEST_FILE
        if not resuming and latest.exists():
            logger.warning("%s: starting anew beside the checkpoints of an earlier run, which will be replaced", latest)
            latest.unlink()

    @contextmanager
    def write(self, step: int) -> Iterator[Path]:
        """Yield an empty folder to fill; on success it takes its final name and is the latest checkpoint."""
        final = self.step_folder(step)
        if final.exists():
            _remove(final)
        with atomic_directory(final) as temporary:
            yield temporary
        with atomic_write(self.folder / LATEST_FILE, "w") as stream:
            stream.write(str(step))

    def drop_old(self, in_use: Collection[int] = ()) -> None:
        """Delete all but the newest `max_to_keep` checkpoints up to the latest, and those `in_use`."""
        latest = self.folder / LATEST_FILE
        if self._max_to_keep is None or not latest.exists():
            return
        for step in surplus(self._steps(), int(latest.read_text()), self._max_to_keep):
            if step not in in_use:
                _remove(self.step_folder(step))

    def _steps(self) -> list[int]:
        names = (re.fullmatch(r"global_step_(\d+)", path.name) for path in self.folder.iterdir())
        return [int(name[1]) for name in names if name]


def step_name(step: int) -> str:
    """What the checkpoint after `step` is called."""
    return f"global_step_{step}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name.

    Raises:
        UserError: another name.
    """
    name = re.fullmatch(r"global_step_(\d+)", checkpoint.name)
    if name is None:
        raise UserError(f"{checkpoint}: a checkpoint folder is called global_step_N")
    return int(name[1])


def surplus(steps: Collection[int], latest: int, max_to_keep: int) -> list[int]:
    """Which of `steps` to delete so that `max_to_keep` up to `latest` stay. Later ones are of a run before this one."""
    earlier = sorted(step for step in steps if step < latest)
    return earlier[: max(0, len(earlier) + 1 - max_to_keep)]


def _checked(checkpoint: Path, named_by: str) -> Path:
    step_of(checkpoint)
    if not (checkpoint / TRAINER_STATE_FILE).is_file() or not (checkpoint / "actor").is_dir():
        raise UserError(
            f"{named_by} names {checkpoint}, which is no complete checkpoint (actor/ and {TRAINER_STATE_FILE}); choose "
            "one with trainer.resume_mode=resume_path, or start anew with trainer.resume_mode=disable"
        )
    return checkpoint


def _remove(checkpoint: Path) -> None:
    """Under its final name a checkpoint is always whole, even one that is being deleted."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.doomed.tmp")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)
