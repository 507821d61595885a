"""Only whole checkpoints are ever found, and the latest is never dropped."""

import os
import signal
from itertools import count
from pathlib import Path

import pytest
import torch

from verl.checkpoints.folder import LATEST_FILE, CheckpointFolder, read_state
from xbai.errors import UserError


def _fill(folder):
    (folder / "actor").mkdir()
    (folder / "data.pt").write_bytes(b"state")


def _save(checkpoints, *steps):
    for step in steps:
        with checkpoints.write(step) as folder:
            _fill(folder)
        checkpoints.drop_old()


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_save_that_dies_leaves_the_one_before(tmp_path):
    checkpoints = CheckpointFolder(tmp_path)
    _save(checkpoints, 1)
    with pytest.raises(KeyboardInterrupt), checkpoints.write(2) as folder:
        _fill(folder)
        raise KeyboardInterrupt
    assert checkpoints.find("auto", None) == tmp_path / "global_step_1"
    assert _names(tmp_path) == ["global_step_1", LATEST_FILE]


def test_leftovers_of_a_killed_save_are_removed_and_never_found(tmp_path):
    checkpoints = CheckpointFolder(tmp_path)
    _save(checkpoints, 1)
    killed = tmp_path / ".global_step_2.0123abcd.tmp"
    killed.mkdir()
    _fill(killed)
    assert checkpoints.find("auto", None) == tmp_path / "global_step_1"
    checkpoints.prepare(tmp_path / "global_step_1")
    assert _names(tmp_path) == ["global_step_1", LATEST_FILE]


def test_death_between_rename_and_pointer_saves_the_step_again(tmp_path):
    checkpoints = CheckpointFolder(tmp_path)
    _save(checkpoints, 1, 2)
    (tmp_path / LATEST_FILE).write_text("1", encoding="utf-8")
    assert checkpoints.find("auto", None) == tmp_path / "global_step_1"
    _save(checkpoints, 2)
    assert checkpoints.find("auto", None) == tmp_path / "global_step_2"


def test_retention_keeps_the_newest(tmp_path):
    _save(CheckpointFolder(tmp_path, max_to_keep=2), 1, 2, 10)
    assert _names(tmp_path) == ["global_step_10", "global_step_2", LATEST_FILE]


def test_retention_of_one_keeps_the_latest(tmp_path):
    checkpoints = CheckpointFolder(tmp_path, max_to_keep=1)
    _save(checkpoints, 1, 2)
    assert checkpoints.find("auto", None) == tmp_path / "global_step_2"
    assert not (tmp_path / "global_step_1").exists()


def test_a_checkpoint_in_use_stays_until_it_is_free(tmp_path):
    checkpoints = CheckpointFolder(tmp_path, max_to_keep=1)
    for step in (1, 2, 3):
        with checkpoints.write(step) as folder:
            _fill(folder)
    checkpoints.drop_old(in_use={1})
    assert _names(tmp_path) == ["global_step_1", "global_step_3", LATEST_FILE]
    checkpoints.drop_old()
    assert _names(tmp_path) == ["global_step_3", LATEST_FILE]


def test_an_incomplete_folder_is_refused(tmp_path):
    checkpoints = CheckpointFolder(tmp_path)
    _save(checkpoints, 1)
    (tmp_path / "global_step_1" / "data.pt").unlink()
    with pytest.raises(UserError, match=r"latest_checkpointed_iteration\.txt names .*no complete checkpoint"):
        checkpoints.find("auto", None)
    with pytest.raises(UserError, match=r"trainer\.resume_from_path"):
        checkpoints.find("resume_path", str(tmp_path / "global_step_1"))
    with pytest.raises(UserError, match="is called global_step_N"):
        checkpoints.find("resume_path", str(tmp_path))
    with pytest.raises(UserError, match=r"needs trainer\.resume_from_path"):
        checkpoints.find("resume_path", None)


@pytest.mark.parametrize("content", [b"global_step_4", b"", b"-1", b"\xff\xfe", b"9" * 5000, "٤".encode(), b"<html>\n"])
def test_a_pointer_without_a_step_is_named(tmp_path, content):
    (tmp_path / LATEST_FILE).write_bytes(content)
    with pytest.raises(UserError, match=rf"^{tmp_path}/{LATEST_FILE} must hold the step .*, not '.*'; write the N"):
        CheckpointFolder(tmp_path).find("auto", None)


def test_a_pointer_that_is_a_folder_or_names_none_is_named(tmp_path):
    (tmp_path / LATEST_FILE).write_text("7", encoding="utf-8")
    with pytest.raises(UserError, match=rf"{LATEST_FILE} names {tmp_path}/global_step_7, which is no complete"):
        CheckpointFolder(tmp_path).find("auto", None)
    (tmp_path / LATEST_FILE).unlink()
    (tmp_path / LATEST_FILE).mkdir()
    with pytest.raises(UserError, match=rf"{LATEST_FILE} cannot be read .*Is a directory"):
        CheckpointFolder(tmp_path).find("auto", None)


@pytest.mark.parametrize("state", [None, [1, 2], "text", torch.ones(3)])
def test_a_state_of_something_else_is_named(tmp_path, state):
    torch.save(state, tmp_path / "data.pt")
    with pytest.raises(UserError, match=rf"^{tmp_path}/data.pt: no trainer's state, but ") as refused:
        read_state(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04", bytes(range(256))])
def test_a_state_that_is_damaged_is_named(tmp_path, content):
    # Of a checkpoint without sums; those that have them say it by them.
    (tmp_path / "data.pt").write_bytes(content)
    with pytest.raises(UserError, match=rf"^{tmp_path}/data.pt: ") as refused:
        read_state(tmp_path)
    assert "\n" not in str(refused.value)


def test_disable_starts_anew(tmp_path):
    checkpoints = CheckpointFolder(tmp_path)
    _save(checkpoints, 4)
    assert checkpoints.find("disable", None) is None
    checkpoints.prepare(None)
    assert checkpoints.find("auto", None) is None
    _save(checkpoints, 2)
    assert checkpoints.find("auto", None) == tmp_path / "global_step_2"


def _killed_while_saving(checkpoints: CheckpointFolder, step: int, at_rename: int) -> None:
    """Save a checkpoint in another process, which is killed as it is to rename something for the nth time."""
    child = os.fork()
    if child == 0:
        numbers, rename = count(), Path.rename

        def rename_or_die(source: Path, target: Path) -> Path:
            if next(numbers) == at_rename:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(source, target)

        Path.rename = rename_or_die
        _save(checkpoints, step)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("at_rename", [0, 1])
def test_a_run_that_went_back_is_killed_as_it_replaces_a_checkpoint(tmp_path: Path, at_rename: int) -> None:
    checkpoints, start = CheckpointFolder(tmp_path), tmp_path / "global_step_5"
    _save(checkpoints, 5, 10)
    checkpoints.prepare(checkpoints.find("resume_path", str(start)))
    _killed_while_saving(checkpoints, 10, at_rename)
    assert (tmp_path / "global_step_10").exists() == (at_rename == 0)
    assert checkpoints.find("auto", None) == start
    checkpoints.prepare(start)
    _save(checkpoints, 10)
    assert checkpoints.find("auto", None) == tmp_path / "global_step_10"
    assert _names(tmp_path) == ["global_step_10", "global_step_5", LATEST_FILE]


def test_a_checkpoint_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    _save(checkpoints, 1)
    with pytest.raises(KeyboardInterrupt), checkpoints.write(1) as folder:
        _fill(folder)
        raise KeyboardInterrupt
    assert checkpoints.find("auto", None) == tmp_path / "global_step_1"


def test_going_on_from_elsewhere_forgets_the_run_that_was_here(tmp_path: Path) -> None:
    here, elsewhere = CheckpointFolder(tmp_path / "here"), CheckpointFolder(tmp_path / "elsewhere")
    for checkpoints in (here, elsewhere):
        _save(checkpoints, 5)
    here.prepare(elsewhere.find("auto", None))
    assert here.find("auto", None) is None


def test_a_rehearsal_leaves_nothing_whatever_happens(tmp_path):
    checkpoints = CheckpointFolder(tmp_path / "run")
    with checkpoints.rehearse() as folder:
        _fill(folder)
        assert folder.parent == tmp_path / "run"
    with pytest.raises(OSError, match="full"), checkpoints.rehearse() as folder:
        _fill(folder)
        raise OSError("full")
    assert _names(tmp_path / "run") == [] and checkpoints.find("auto", None) is None


@pytest.mark.parametrize("named", ["global_step_80", "global_step_80/actor", None])
def test_a_checkpoint_of_verl_is_to_be_merged_first(named, tmp_path):
    actor = tmp_path / "global_step_80" / "actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "model_world_size_8_rank_0.pt").touch()
    (actor.parent / "data.pt").touch()
    (tmp_path / LATEST_FILE).write_text("80", encoding="utf-8")
    mode = "auto" if named is None else "resume_path"
    checkpoint = tmp_path / (named or "global_step_80")
    with pytest.raises(UserError, match="a checkpoint of verl's FSDP trainer") as caught:
        CheckpointFolder(tmp_path).find(mode, checkpoint)
    assert f"model_merger.py --local_dir {checkpoint} --target_dir MODEL" in str(caught.value)
    assert "actor_rollout_ref.model.path=MODEL" in str(caught.value) and "\n" not in str(caught.value)
