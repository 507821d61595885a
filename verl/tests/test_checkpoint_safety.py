"""Reading a checkpoint runs nothing that is in it, and a file that is not what was written is named."""

from __future__ import annotations

import io
import logging
import os
import pickle
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoint_flips import SmallCheckpoint, flip_bits

from verl.checkpoints.checksums import CHECKSUM_FILE, check_checkpoint, file_digest, read_checksums, write_checksums
from verl.checkpoints.folder import TRAINER_STATE_FILE, write_state
from verl.checkpoints.rng_state import load_with_rng, rng_state, set_rng_state
from verl.checkpoints.storage import METADATA_FILE, read_metadata
from xbai.errors import UserError

CANARY = "canary"


class Intruder:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (CANARY,)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A `SmallCheckpoint`; not to be changed."""
    folder = tmp_path_factory.mktemp("written")
    dist.init_process_group("gloo", init_method=f"file://{folder}/.store", rank=0, world_size=1)
    yield SmallCheckpoint(folder)
    dist.destroy_process_group()


@pytest.fixture
def checkpoint(written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A copy to be changed. Intruders leave their canary in the working folder."""
    path = shutil.copytree(written.path, tmp_path / "run" / "global_step_1")
    monkeypatch.setattr(written, "path", path)
    monkeypatch.chdir(tmp_path)
    return written


def sign_anew(folder: Path) -> None:
    """Who changes a file can also write its sum."""
    write_checksums(folder, {name: file_digest(folder / name) for name in read_checksums(folder)})


def saved(value: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def intrude_in_trainer_state(checkpoint: Path) -> None:
    (checkpoint / TRAINER_STATE_FILE).write_bytes(saved({"step": 1, "loader": Intruder()}))


def intrude_in_metadata(checkpoint: Path) -> None:
    path = checkpoint / "actor" / METADATA_FILE
    metadata = read_metadata(path.parent)
    metadata.planner_data["model.lm.x"] = Intruder()
    path.write_bytes(pickle.dumps(metadata))


def intrude_instead_of_metadata(checkpoint: Path) -> None:
    """By a name that leads from a module that is known to another."""
    code = b"\x80\x04\x8c\x05torch\x8c\x08os.mkdir\x93\x8c\x06canary\x85R."
    (checkpoint / "actor" / METADATA_FILE).write_bytes(code)


def replace_entry(name: str, content: bytes) -> Callable[[Path], None]:
    """Have the metadata say that an entry lies where `content` is."""

    def change(checkpoint: Path) -> None:
        folder = checkpoint / "actor"
        shard, metadata = folder / "__0_0.distcp", read_metadata(folder)
        (index,) = (index for index in metadata.storage_data if index.fqn == name)
        place = replace(metadata.storage_data[index], offset=shard.stat().st_size, length=len(content))
        metadata.storage_data[index] = place
        with shard.open("ab") as stream:
            stream.write(content)
        (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))

    return change


VALUE, REFUSED = "policy_schedule.last_epoch", "which could run code when read; not loaded"
INTRUSIONS = {
    "trainer_state": (intrude_in_trainer_state, rf"data\.pt: holds more than tensors, {REFUSED}"),
    "metadata": (intrude_in_metadata, rf"\.metadata: holds posix\.mkdir, {REFUSED}"),
    "name": (intrude_instead_of_metadata, rf"\.metadata: holds torch\.os\.mkdir, {REFUSED}"),
    "value": (replace_entry(VALUE, saved(Intruder())), rf"{VALUE}: .*{REFUSED}"),
    "raw_value": (replace_entry(VALUE, pickle.dumps(Intruder())), f"{VALUE}: "),
    "tensor": (
        replace_entry("model.score_head.0.bias", saved(Intruder())),
        rf"actor: holds more than tensors, {REFUSED}",
    ),
    "random_states": (replace_entry("rng.rank_0", saved(saved(Intruder()))), rf"actor: rng\.rank_0: .*{REFUSED}"),
}


@pytest.mark.parametrize("where", INTRUSIONS)
def test_nothing_in_a_checkpoint_is_run(where: str, checkpoint: Any) -> None:
    intrude, message = INTRUSIONS[where]
    intrude(checkpoint.path)
    sign_anew(checkpoint.path)
    sign_anew(checkpoint.path / "actor")
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.resume()
    assert "\n" not in str(caught.value)
    if where in ("metadata", "name", "tensor"):
        with pytest.raises(UserError, match=message):
            checkpoint.merge()
    assert not Path(CANARY).exists()


def test_an_intruder_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.load(io.BytesIO(saved(Intruder())), weights_only=False)
    assert Path(CANARY).is_dir()


def test_metadata_of_files_elsewhere_is_refused(checkpoint: Any, tmp_path: Path) -> None:
    folder = checkpoint.path / "actor"
    shutil.copy(folder / "__0_0.distcp", tmp_path / "elsewhere.distcp")
    metadata = read_metadata(folder)
    for index, place in metadata.storage_data.items():
        metadata.storage_data[index] = replace(place, relative_path=str(tmp_path / "elsewhere.distcp"))
    (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    sign_anew(folder)
    for read in (checkpoint.resume, checkpoint.merge):
        with pytest.raises(UserError, match=r"\.metadata: describes no checkpoint of this folder"):
            read()


def test_a_state_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.pt: holds more than tensors"):
        write_state({"loader": {"sampler": np.int64(3)}}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_random_states_of_older_checkpoints_go_on(tmp_path: Path) -> None:
    random.seed(5)
    np.random.seed(5)
    np.random.normal()
    torch.manual_seed(5)
    older, newer = rng_state() | {"numpy": np.random.get_state()}, rng_state()
    draws = []
    for state in (older, newer):
        set_rng_state(load_with_rng(io.BytesIO(saved({"rng": state})), "state")["rng"])
        draws.append((random.random(), np.random.normal(), np.random.random(), torch.rand(2).tolist()))
    assert draws[0] == draws[1] and not isinstance(newer["numpy"][1], np.ndarray)


def test_a_flipped_bit_is_named_on_resuming_and_merging(checkpoint: Any) -> None:
    figures = flip_bits(checkpoint, flips=110, seed=0)
    assert figures["files"] >= 10
    assert figures["refused"] == figures["checkpoint_flips"] == 110, figures["examples"]


def test_flips_that_nothing_checks_are_counted(checkpoint: Any) -> None:
    """What the test above finds where there is something to find."""
    for path in checkpoint.path.rglob(CHECKSUM_FILE):
        path.unlink()
    assert flip_bits(checkpoint, flips=9, seed=0)["silently_wrong"] > 0


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("break_it", [cut, Path.unlink])
def test_a_file_that_is_cut_or_missing_is_named(break_it: Callable, checkpoint: Any) -> None:
    for file in sorted(path for path in checkpoint.path.rglob("*") if path.is_file()):
        content = file.read_bytes()
        break_it(file)
        for read in checkpoint.readers_of(file).values():
            with pytest.raises(UserError) as caught:
                read()
            assert str(file) in str(caught.value) or file.name == METADATA_FILE, str(caught.value)
            assert "\n" not in str(caught.value)
        file.write_bytes(content)
    checkpoint.resume()
    checkpoint.merge()


def test_an_older_checkpoint_is_read_with_one_warning(checkpoint: Any, caplog: pytest.LogCaptureFixture) -> None:
    for path in checkpoint.path.rglob(CHECKSUM_FILE):
        path.unlink()
    for read, folder in ((checkpoint.resume, checkpoint.path), (checkpoint.merge, checkpoint.path / "actor")):
        caplog.clear()
        read()
        (warning,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
        assert warning.startswith(f"{folder} is of an earlier version, without {CHECKSUM_FILE}")


def test_the_sums_are_those_of_coreutils(written: Any) -> None:
    for folder in (written.path, written.path / "actor"):
        done = subprocess.run(
            ["sha256sum", "--check", "--strict", CHECKSUM_FILE], cwd=folder, capture_output=True, text=True
        )
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        others = {name for name in files if name.startswith("actor/")} | {CHECKSUM_FILE}
        assert done.returncode == 0, done.stderr
        assert {line.removesuffix(": OK") for line in done.stdout.splitlines()} == files - others


def test_sums_of_files_elsewhere_are_refused(tmp_path: Path) -> None:
    for name in ("/etc/passwd", "../x"):
        write_checksums(tmp_path, {name: "0"})
        with pytest.raises(UserError, match=rf"{CHECKSUM_FILE} names '{name}', which is no file of this checkpoint"):
            check_checkpoint(tmp_path)
