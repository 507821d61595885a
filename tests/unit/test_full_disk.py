"""A disk that is full, or only readable: one line, and nothing that was there is lost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from verl.utils.tracking import METRICS_FILE, Tracking
from xbai.errors import UserError, exit_on_user_error
from xbai.files import atomic_write, check_directory, check_writable
from xbai.infer.store import ResultStore
from xbai.results.lines import Sample, StoredQuestion, read_result_lines
from xbai.results.settings import RunSettings
from xbai.sprm import ScoreHead, save_score_head
from xbai.sprm.step_features import FeatureSource, StepFeatures
from xbai.sprm.step_rule import StepRule

REPOSITORY = Path(__file__).parents[2]
FULL = r"cannot be written \(OSError: \[Errno 28\] No space left on device; make room or choose another folder\)$"
READ_ONLY = r"cannot be written \(OSError: \[Errno 30\] .*; choose a folder that can be written\)$"


def features(folder: Path) -> None:
    source = FeatureSource("model", StepRule("en", (1,)), (0,), torch.float32)
    with StepFeatures.create(folder / "a.safetensors", source, [1000], 64):
        pass


def text(folder: Path) -> None:
    with atomic_write(folder / "a", "w") as stream:
        stream.write("x" * 300_000)


def bytes_piece_by_piece(folder: Path) -> None:
    with atomic_write(folder / "a") as stream:
        for _ in range(300):
            stream.write(b"x" * 1000)


def head(folder: Path) -> None:
    save_score_head(folder, ScoreHead(256).state_dict(), None)


@pytest.mark.parametrize("write", [text, bytes_piece_by_piece, features, head])
def test_what_does_not_fit_is_one_line_and_leaves_what_was_there(
    small_disk: Path, write: Callable[[Path], None]
) -> None:
    (small_disk / "a").write_text("old", encoding="utf-8")
    with pytest.raises(UserError, match=FULL) as refused:
        write(small_disk)
    assert str(refused.value).startswith(str(small_disk))
    assert [(path.name, path.read_text(encoding="utf-8")) for path in small_disk.iterdir()] == [("a", "old")]


def test_errors_of_what_is_read_meanwhile_are_not_of_the_file(tmp_path: Path) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "no such file", "other"), ConnectionResetError(), OSError("short")):
        with pytest.raises(OSError) as raised, atomic_write(tmp_path / "a"):
            raise error
        assert raised.value is error
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_only_readable_is_told_before_and_after(
    small_disk: Path, remount: Callable[[str], None]
) -> None:
    remount("ro")
    for attempt in (check_writable, check_directory, lambda path: text(path.parent)):
        with pytest.raises(UserError, match=rf"^{small_disk}/a: {READ_ONLY}"):
            attempt(small_disk / "a")


def test_a_run_whose_result_file_does_not_fit_goes_on_when_there_is_room(
    small_disk: Path, remount: Callable[[str], None]
) -> None:
    settings = RunSettings("make10", "m", "q", 0.8, 0.95, -1, 1.05, 64, (), 0)
    questions = [StoredQuestion(0, "question", "1", {})]
    kept = [Sample(0, number, "r" * 30_000, "stop", 3, 0.5, 0.5, [0.5]) for number in range(5)]
    path = small_disk / "out.jsonl"
    with ResultStore(path, settings, questions) as store:
        store.add(*kept)
        with pytest.raises(UserError, match=rf"^{path}: {FULL}"):
            store.write_results()
    assert [file.name for file in small_disk.iterdir()] == ["out.jsonl.journal"]
    remount("size=1m")
    with ResultStore(path, settings, questions) as store:
        assert len(store) == len(kept)
        store.write_results()
    (line,) = read_result_lines(path)
    assert line.samples == kept


def test_metrics_that_do_not_fit_end_the_run_in_one_line(small_disk: Path) -> None:
    refused = pytest.raises(UserError, match=rf"^{small_disk}: no metrics can be written \(OSError: \[Errno 28\]")
    with refused, Tracking("p", "e", ["file"], small_disk) as tracking:
        tracking.log({"reward": 0.5}, 1)
        (small_disk / "other").write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
        for step in range(2, 1000):
            tracking.log({"reward": 0.5}, step)
    (small_disk / "other").unlink()
    steps = len((small_disk / METRICS_FILE).read_text(encoding="utf-8").splitlines())
    with Tracking("p", "e", ["file"], small_disk, resume_step=1000) as tracking:
        tracking.log({"reward": 0.5}, steps + 1)
    assert (small_disk / METRICS_FILE).read_text(encoding="utf-8").endswith(f'{{"step": {steps + 1}, "reward": 0.5}}\n')


def test_a_command_whose_disk_is_full_ends_in_one_line(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @exit_on_user_error
    def command() -> None:
        (small_disk / "log").write_bytes(b"x" * 300_000)

    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line
        == "error: a file cannot be written ([Errno 28] No space left on device); make room, or choose another disk"
    )


def prepare(out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "data" / "prepare.py"), "make10", "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_prepare_on_a_full_disk_and_on_one_that_is_only_readable(
    small_disk: Path, remount: Callable[[str], None]
) -> None:
    for option, why in (("rw", "No space left on device"), ("ro", "Read-only file system")):
        remount(option)
        done = prepare(small_disk)
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: {small_disk}/")
        assert why in line
