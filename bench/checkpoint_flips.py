"""Single bits of a real checkpoint flipped one after another: each must be refused by one line that names the file.

    python bench/checkpoint_flips.py [--flips 400] [--seed 0] [--out bench/results/checkpoint_flips.json]

The checkpoint is of a tiny model with score head and optimisers, written by one rank as the trainers do. Every file has
its turn. The reader is what resumes a run (`read_state`, `load_checkpoint`), and for files of `actor/` the merger, too.
"""

from __future__ import annotations

import os
import random
import runpy
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import typer
from machine import ROOT, describe_machine, report

from verl.checkpoints.folder import CheckpointFolder, read_state, write_state
from verl.checkpoints.rng_state import rng_state
from verl.checkpoints.state import load_checkpoint, save_checkpoint
from verl.models.fsdp import create_mesh, shard_model
from verl.models.loading import build_joint_model, load_tokenizer
from verl.optim.optimizers import JointOptimizer
from verl.trainer.config.defaults import plain_defaults
from verl.trainer.config.fields import with_values
from xbai.benchmarks.tiny_model import write_tiny_model
from xbai.errors import UserError, exit_on_user_error
from xbai.model_files import ModelFiles
from xbai.sprm import load_sprm_config


class SmallCheckpoint:
    """A checkpoint, and the ways to read it. Needs a process group of one rank.

    Args:
        folder: an empty one.

    Attributes:
        path: `folder/run/global_step_1`.
    """

    def __init__(self, folder: Path) -> None:
        self._merge = runpy.run_path(str(ROOT / "verl/scripts/model_merger.py"))["merge"]
        self._merged, base = folder / "merged", folder / "base"
        write_tiny_model(base)
        sprm_config = load_sprm_config(base, load_tokenizer(base))
        model = build_joint_model(base, sprm_config=sprm_config)
        self._model = shard_model(model, create_mesh())
        optim = with_values(plain_defaults().critic.optim, {"lr": 1e-3})
        self._optimizer = JointOptimizer(self._model, optim, optim)
        checkpoints = CheckpointFolder(folder / "run")
        with checkpoints.write(1) as target:
            write_state({"step": 1, "rng": rng_state()}, target)
            save_checkpoint(target / "actor", self._model, self._optimizer, ModelFiles.read(base), sprm_config)
        self.path = checkpoints.step_folder(1)

    def readers_of(self, file: Path) -> Mapping[str, Callable[[], None]]:
        """What reads a file of it, by name."""
        in_actor = file.is_relative_to(self.path / "actor")
        return {"resume": self.resume} | ({"merge": self.merge} if in_actor else {})

    def read_by_all(self) -> None:
        """Make sure that nothing refuses it."""
        self.resume()
        self.merge()

    def resume(self) -> None:
        """Read it as a run that goes on does."""
        read_state(self.path)
        load_checkpoint(self.path / "actor", self._model, self._optimizer)

    def merge(self) -> None:
        """Make a model folder of it."""
        try:
            self._merge(self.path / "actor", self._merged)
        finally:
            shutil.rmtree(self._merged, ignore_errors=True)


def flip_bits(checkpoint: SmallCheckpoint, flips: int, seed: int) -> dict[str, Any]:
    """Flip bits of a checkpoint, which is as it was in the end.

    Args:
        checkpoint: a whole one.
        flips: how many; files take turns, bits are drawn.
        seed: of the draw.

    Returns:
        `checkpoint_flips`, of them `refused` by every reader, and of the others, by reader: `silently_wrong` (read as
        if nothing were), `not_named` (an error that does not name the file in one line), `crashed` (a traceback);
        `examples` of these; `files`, `seconds`.
    """
    start, rng = time.perf_counter(), random.Random(seed)
    files = sorted(path for path in checkpoint.path.rglob("*") if path.is_file() and path.stat().st_size)
    outcomes, refused, examples = Counter[str](), 0, []
    checkpoint.read_by_all()
    for file, _ in zip(cycle(files), range(flips)):
        with _flipped(file, rng.randrange(8 * file.stat().st_size)) as bit:
            found = {name: _outcome(read, file) for name, read in checkpoint.readers_of(file).items()}
        outcomes.update(found.values())
        refused += set(found.values()) == {"refused"}
        examples += [f"{file}, bit {bit}: {how} on {name}" for name, how in found.items() if how != "refused"]
    checkpoint.read_by_all()
    return {
        "checkpoint_flips": flips,
        "refused": refused,
        **{kind: outcomes[kind] for kind in ("silently_wrong", "not_named", "crashed")},
        "examples": examples[:5],
        "files": len(files),
        "seconds": time.perf_counter() - start,
    }


def flip_checkpoint(work: Path, flips: int, seed: int) -> dict[str, Any]:
    """Write a checkpoint in an empty folder, on a process group of this process alone, and `flip_bits` of it."""
    with _alone(work):
        return flip_bits(SmallCheckpoint(work), flips, seed)


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{work}/.store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _flipped(file: Path, bit: int) -> Iterator[int]:
    def flip() -> None:
        descriptor = os.open(file, os.O_RDWR)
        try:
            byte = os.pread(descriptor, 1, bit // 8)[0]
            os.pwrite(descriptor, bytes([byte ^ 1 << bit % 8]), bit // 8)
        finally:
            os.close(descriptor)

    flip()
    try:
        yield bit
    finally:
        flip()


def _outcome(read: Callable[[], None], file: Path) -> str:
    try:
        read()
    except UserError as error:
        return "refused" if str(file) in str(error) and "\n" not in str(error) else "not_named"
    except Exception:
        return "crashed"
    return "silently_wrong"


@exit_on_user_error
def main(
    flips: Annotated[int, typer.Option(help="how many bits")] = 400,
    seed: Annotated[int, typer.Option(help="of their choice")] = 0,
    out: Annotated[Path, typer.Option(help="the JSON file to write")] = ROOT / "bench/results/checkpoint_flips.json",
) -> None:
    """Entry point."""
    with tempfile.TemporaryDirectory() as work:
        figures = flip_checkpoint(Path(work), flips, seed)
    report({**figures, "machine": describe_machine()}, out)


if __name__ == "__main__":
    typer.run(main)
