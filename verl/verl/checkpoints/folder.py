"""The folder of a run's checkpoints: which one to go on from, writing the next, dropping old ones."""

from __future__ import annotations

import hashlib
import io
import logging
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from verl.checkpoints.checksums import CHECKSUM_FILE, REMEDY, check_files, read_checksums, write_checksums
from verl.checkpoints.rng_state import load_with_rng
from verl.checkpoints.verl_shards import has_verl_shards
from xbai.errors import UserError, one_line
from xbai.files import atomic_directory, atomic_write

logger = logging.getLogger(__name__)

LATEST_FILE = "latest_checkpointed_iteration.txt"
TRAINER_STATE_FILE = "data.pt"


class CheckpointFolder:
    """`folder/global_step_N/{actor/,data.pt}`, with the step to resume from in `latest_checkpointed_iteration.txt`.

    A checkpoint is written under a temporary name and renamed when it is complete, and only then named as the latest:
    one with its final name is whole, and a run that died while saving goes on from the one before. What a run goes on
    from is its latest until it saves: those after it are of an earlier run, and are replaced one by one.

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
        """The checkpoint to go on from, or None for a new run; a `UserError` where it is named but not there."""
        if resume_mode == "resume_path":
            if resume_from_path is None:
                raise UserError("trainer.resume_mode=resume_path needs trainer.resume_from_path")
            return _checked(Path(resume_from_path), "trainer.resume_from_path")
        latest = None if resume_mode == "disable" else self.latest()
        return None if latest is None else _checked(self.step_folder(latest), str(self.folder / LATEST_FILE))

    def latest(self) -> int | None:
        """The step that the next start goes on from; a `UserError` where the file that names it holds no number."""
        pointer = self.folder / LATEST_FILE
        if not pointer.exists():
            return None
        try:
            text = pointer.read_text(errors="replace", encoding="utf-8").strip()
        except OSError as error:
            raise UserError(f"{pointer} cannot be read ({one_line(error)})") from error
        if not re.fullmatch(r"[0-9]{1,18}", text):
            raise UserError(
                f"{pointer} must hold the step of the latest checkpoint, not {text[:40]!r}; write the N of the last "
                "whole global_step_N into it, or choose one with trainer.resume_mode=resume_path"
            )
        return int(text)

    def prepare(self, start: Path | None) -> None:
        """Remove what killed saves left behind, and forget the checkpoints of an earlier run that went further.

        `start` is the checkpoint that the run goes on from; None for a new run.
        """
        for leftover in self.folder.glob(".global_step_*.tmp"):
            logger.info("removing %s: a save that was interrupted", leftover)
            shutil.rmtree(leftover)
        own = step_of(start) if start is not None and start.parent.resolve() == self.folder.resolve() else None
        latest = self.latest()
        if latest == own:
            return
        if latest is not None:
            logger.warning(
                "%s: the checkpoints after step %d are of an earlier run and will be replaced", self.folder, own or 0
            )
        if own is None:
            (self.folder / LATEST_FILE).unlink()
        else:
            self._name_latest(own)

    @contextmanager
    def rehearse(self) -> Iterator[Path]:
        """Yield an empty folder to fill, which is no checkpoint and is removed again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # What a network file system holds on to for a while is no reason to refuse a run; `prepare` removes it later.
        with TemporaryDirectory(".tmp", ".global_step_try_", self.folder, ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    @contextmanager
    def write(self, step: int) -> Iterator[Path]:
        """Yield an empty folder to fill; on success it takes its final name and is the latest checkpoint."""
        with atomic_directory(self.step_folder(step), replace=True) as temporary:
            yield temporary
        self._name_latest(step)

    def drop_old(self, in_use: Collection[int] = ()) -> None:
        """Delete all but the newest `max_to_keep` checkpoints up to the latest, and those `in_use`."""
        latest = self.latest()
        if self._max_to_keep is None or latest is None:
            return
        steps = steps_among(path.name for path in self.folder.iterdir())
        for step in surplus(steps, latest, self._max_to_keep):
            if step not in in_use:
                # Under its final name a checkpoint is always whole, even one that is being deleted.
                doomed = self.folder / f".{step_name(step)}.doomed.tmp"
                self.step_folder(step).rename(doomed)
                shutil.rmtree(doomed)

    def _name_latest(self, step: int) -> None:
        with atomic_write(self.folder / LATEST_FILE, "w") as stream:
            stream.write(str(step))


def step_name(step: int) -> str:
    """What the checkpoint after `step` is called."""
    return f"global_step_{step}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name; a `UserError` where that is another."""
    if steps := steps_among([checkpoint.name]):
        return steps[0]
    raise UserError(f"{checkpoint}: a checkpoint folder is called global_step_N")


def steps_among(names: Iterable[str]) -> list[int]:
    """The steps of those names that are of checkpoints."""
    matches = (re.fullmatch(r"global_step_(\d+)", name) for name in names)
    return [int(match[1]) for match in matches if match]


def surplus(steps: Collection[int], latest: int, max_to_keep: int) -> list[int]:
    """Which of `steps` to delete so that `max_to_keep` up to `latest` stay. Later ones are of a run before this one."""
    earlier = sorted(step for step in steps if step < latest)
    return earlier[: max(0, len(earlier) + 1 - max_to_keep)]


def write_state(state: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint's `data.pt`, of tensors and plain values, and its sum."""
    # By way of memory: torch's own writing to a file hides why it failed.
    stream, file = io.BytesIO(), folder / TRAINER_STATE_FILE
    torch.save(state, stream)
    content = stream.getvalue()
    # What cannot be read again is to fail as it is written.
    load_with_rng(io.BytesIO(content), file)
    file.write_bytes(content)
    write_checksums(folder, {file.name: hashlib.sha256(content).hexdigest()})


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `write_state` wrote; a `UserError` where it is damaged, or holds more than plain values, or no state."""
    sums = read_checksums(checkpoint)
    if not sums:
        logger.warning("%s is of an earlier version, without %s: its files are not checked", checkpoint, CHECKSUM_FILE)
    check_files(checkpoint, sums)
    state = load_with_rng(checkpoint / TRAINER_STATE_FILE)
    if not isinstance(state, dict):
        raise UserError(f"{checkpoint / TRAINER_STATE_FILE}: no trainer's state, but {state!r:.60}; {REMEDY}")
    return state


def _checked(checkpoint: Path, named_by: str) -> Path:
    if has_verl_shards(checkpoint / "actor") or has_verl_shards(checkpoint):
        raise UserError(
            f"{named_by} names {checkpoint}, a checkpoint of verl's FSDP trainer, which cannot be gone on from here; "
            f"merge it first (python verl/scripts/model_merger.py --local_dir {checkpoint} --target_dir MODEL), then "
            "start from the model, in a folder of its own (actor_rollout_ref.model.path=MODEL trainer.resume_mode=auto "
            "trainer.default_local_dir=NEW)"
        )
    step_of(checkpoint)
    if not (checkpoint / TRAINER_STATE_FILE).is_file() or not (checkpoint / "actor").is_dir():
        raise UserError(
            f"{named_by} names {checkpoint}, which is no complete checkpoint (actor/ and {TRAINER_STATE_FILE}); choose "
            "one with trainer.resume_mode=resume_path, or start anew with trainer.resume_mode=disable"
        )
    return checkpoint
