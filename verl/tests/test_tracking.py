"""Metrics reach their files, and a resumed run leaves no duplicated step."""

import json

import pytest
from clocks import wait_until

from verl.utils.tracking import METRICS_FILE, Tracking
from xbai.errors import UserError


def _rows(folder):
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]


def _track(folder, backends=("file",), resume_step=0):
    return Tracking("project", "experiment", backends, folder, {"seed": 1}, resume_step)


def test_file_drops_nan_and_is_readable_at_once(tmp_path):
    with _track(tmp_path) as tracking:
        tracking.log({"reward": 0.5, "auc": float("nan")}, step=1)
        assert _rows(tmp_path) == [{"step": 1, "reward": 0.5}]


def test_resume_drops_repeated_steps_and_half_a_line(tmp_path):
    with _track(tmp_path) as tracking:
        for step in (1, 2, 3):
            tracking.log({"reward": float(step)}, step)
    with (tmp_path / METRICS_FILE).open("a", encoding="utf-8") as stream:
        stream.write('{"step": 4, "rew')
    with _track(tmp_path, resume_step=2) as tracking:
        tracking.log({"reward": 30.0}, 3)
    assert [(row["step"], row["reward"]) for row in _rows(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.parametrize("line", [b"[1]", b"{", b"\xff", b'{"reward": 1}'])
def test_a_line_that_is_none_is_named(tmp_path, line):
    (tmp_path / METRICS_FILE).write_bytes(b'{"step": 1, "reward": 1.0}\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"^{tmp_path}/{METRICS_FILE}:2: no metrics of a step .*; remove the line"):
        _track(tmp_path, resume_step=5)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=rf"^{tmp_path}/file/logs: no metrics can be written .*; choose another folder"):
        _track(tmp_path / "file" / "logs")


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    for value in (1.0, 2.0):
        with _track(tmp_path) as tracking:
            tracking.log({"reward": value}, 1)
    assert _rows(tmp_path) == [{"step": 1, "reward": 2.0}]


def test_tensorboard_writes_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with _track(tmp_path, ["tensorboard"]) as tracking:
        tracking.log({"reward": 0.25}, 7)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(7, 0.25)]


def test_the_console_shows_seconds_and_tokens_per_second_of_every_phase(tmp_path, caplog):
    with _track(tmp_path, ["console"]) as tracking, caplog.at_level("INFO"):
        tracking.log({"timing_s/ref": 2.0, "perf/ref_tokens_per_s": 50.0, "perf/ref_memory_gib": 1.0}, 3)
    assert caplog.messages == ["step 3\n  timing_s: ref 2\n  perf: ref_tokens_per_s 50"]


def test_wandb_logs_offline_without_a_key(tmp_path, monkeypatch):
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with _track(tmp_path, ["wandb"]) as tracking:
        tracking.log({"reward": 0.25}, 1)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert (tmp_path / "wandb_run_id.txt").read_text(encoding="utf-8")


def test_wandb_takes_the_steps_that_a_resumed_run_repeats(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with _track(tmp_path, ["wandb"]) as tracking:
        for step in (5, 4, 6):
            tracking.log({"reward": step + 0.125}, step)
    file = next(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    # wandb's service may still be writing when a run has finished.
    rewards = (b"5.125", b"4.125", b"6.125")
    wait_until(lambda: all(reward in file.read_bytes() for reward in rewards), "the rewards are written")


def test_unknown_logger_is_named(tmp_path):
    with pytest.raises(UserError, match=r"trainer\.logger.*'neptune'"):
        _track(tmp_path, ["neptune"])
