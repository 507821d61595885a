"""What trackers of others hold of a run that was interrupted and went on, read back by their own means.

None of the libraries is needed for the other tests, and swanlab wants an older protobuf than ours: where one is not
installed (`pip install trackio mlflow swanlab` in an environment that may change), its test says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from clocks import wait_until

from verl.utils import tracking
from verl.utils.tracking import BACKENDS, PACKAGES, WITH_TABLES, Tracking, check_backends
from xbai.errors import UserError

SAMPLES = [
    {"prompt": "4 × 5?\n", "response": "**20**\n\n    <b>so</b>", "step_scores": "0.91 0.34", "correct": 1.0},
    {"prompt": "4 × 5?\n", "response": "21 | no", "step_scores": "", "correct": 0.0},
]
CONFIG = {"trainer": {"seed": 1, "logger": ["file"]}, **{f"key_{number}": number for number in range(150)}}
LOGGED = [(1, 1.125), (2, 2.125), (2, 20.125), (3, 3.125)]
"""Steps and rewards, from the third on after an interruption behind step 1."""


@pytest.fixture(autouse=True)
def nobody_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are there files of trackers, or of logins, outside `tmp_path`."""
    for variable in (
        *("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI", "SWANLAB_API_KEY", "SWANLAB_MODE"),
        *("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"),
    ):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def track(folder: Path, backend: str, resume_step: int = 0) -> Tracking:
    return Tracking("project", "experiment", [backend], folder, CONFIG, resume_step)


def interrupted_run(folder: Path, backend: str) -> None:
    """Logs `LOGGED`, and `SAMPLES` of the last step."""
    for resume_step, part in ((0, LOGGED[:2]), (1, LOGGED[2:])):
        with track(folder, backend, resume_step) as tracking:
            for step, reward in part:
                tracking.log({"val/pass@1": reward, "none": float("nan")}, step)
            if resume_step:
                tracking.log_samples(SAMPLES, step)
                tracking.log_samples([], step)


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    interrupted_run(tmp_path, "mlflow")
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("project").experiment_id])
    assert (run.info.run_name, run.info.status) == ("experiment", "FINISHED")
    assert {name: run.data.params[name] for name in ("trainer.seed", "key_149")} == {
        "trainer.seed": "1",
        "key_149": "149",
    }
    history = client.get_metric_history(run.info.run_id, "val/pass_at_1")
    assert sorted((point.step, point.value) for point in history) == sorted(LOGGED)
    assert list(run.data.metrics) == ["val/pass_at_1"]
    table = json.loads(Path(run.info.artifact_uri.removeprefix("file://"), "samples.json").read_text(encoding="utf-8"))
    assert [dict(zip(table["columns"], row)) for row in table["data"]] == [{"step": 3, **sample} for sample in SAMPLES]


def test_what_mlflow_does_not_take_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    with track(tmp_path, "mlflow") as tracking:
        monkeypatch.setattr(mlflow.MlflowClient, "log_batch", _refused(mlflow.MlflowException("no\nanswer")))
        tracking.log({"reward": 1.0}, 7)
    assert caplog.messages[-1] == "mlflow has not taken step 7: no answer"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://x")
    with pytest.raises(UserError, match=r"^trainer\.logger: mlflow at nowhere://x cannot be used \(.*\)$"):
        track(tmp_path, "mlflow")


def _refused(error: Exception) -> Any:
    def refuse(*_: object, **__: object) -> None:
        raise error

    return refuse


def test_trackio_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Read when it is imported, which no other test does.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    interrupted_run(tmp_path / "run", "trackio")
    (run,) = trackio.Api().runs("project")
    logs = trackio.SQLiteStorage.get_logs("project", run.name)
    assert run.name == "experiment"
    assert run.config["trainer"] == CONFIG["trainer"]
    assert sorted((log["step"], log["val/pass@1"]) for log in logs if "val/pass@1" in log) == sorted(LOGGED)
    (table,) = [log["samples"] for log in logs if "samples" in log]
    assert table["_value"] == SAMPLES
    with pytest.raises(UserError, match=r"^trainer\.logger: trackio cannot be used \(Project name 'registry-x' "):
        Tracking("registry-x", "experiment", ["trackio"], tmp_path)


def test_swanlab_goes_on_under_the_same_id(tmp_path: Path) -> None:
    pytest.importorskip("swanlab", reason="swanlab is not installed")
    interrupted_run(tmp_path, "swanlab")
    parts = sorted((tmp_path / "swanlog").glob("run-*"))
    run_id = (tmp_path / "swanlab_run_id.txt").read_text(encoding="utf-8")
    assert {part.name.rpartition("-")[2] for part in parts} == {run_id}
    first, second = (next(part.glob("*.swanlab")).read_bytes() for part in parts)
    assert b"val/pass@1" in first
    assert b"samples" in second
    texts = [path.read_text(encoding="utf-8") for path in parts[1].glob("media/text/*.txt")]
    assert sorted(texts) == sorted("\n\n".join(f"{name}:\n{sample[name]}" for name in sample) for sample in SAMPLES)


def test_wandb_has_samples_as_a_table(tmp_path: Path) -> None:
    interrupted_run(tmp_path, "wandb")
    pattern = "wandb/offline-run-*/files/media/table/samples*.table.json"
    wait_until(lambda: list(tmp_path.glob(pattern)), "the table is written")
    (path,) = tmp_path.glob(pattern)
    table = json.loads(path.read_text(encoding="utf-8"))
    assert [dict(zip(table["columns"], row)) for row in table["data"]] == SAMPLES


def test_tensorboard_has_samples_as_text(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupted_run(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("val/pass@1")] == [
        (1, 1.125),
        (2, 20.125),
        (3, 3.125),
    ]
    (shown,) = events.Tensors("samples/text_summary")
    text = shown.tensor_proto.string_val[0].decode()
    # As code, which markdown does not touch.
    assert "**response**\n\n    **20**\n    \n        <b>so</b>\n\n**step_scores**\n\n    0.91 0.34\n\n" in text


def test_console_and_file_have_no_tables(tmp_path: Path) -> None:
    assert set(BACKENDS) - set(WITH_TABLES) == {"console", "file"}
    interrupted_run(tmp_path, "file")
    assert "prompt" not in (tmp_path / tracking.METRICS_FILE).read_text(encoding="utf-8")


def test_a_package_that_is_missing_is_one_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    said: list[str] = []
    check_backends(["console", *PACKAGES, "file"], said.append)
    line = "trainer.logger: {0} is not installed; pip install {0}, or leave it out"
    assert said == [line.format(name) for name in PACKAGES]
    with pytest.raises(UserError, match=r"^trainer\.logger: neptune is unknown, use some of console, file, "):
        check_backends(["neptune"], said.append)
