"""Traces of a profiled step: whole files with what the phase computed, bounded, and none at other times."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from verl.trainer.ppo.profiled_steps import ProfiledSteps
from verl.workers import phase_profiler
from verl.workers.phase_metrics import measure_phase
from verl.workers.phase_profiler import PHASE_PROFILER


@pytest.fixture(autouse=True)
def nothing_is_traced_afterwards() -> Iterator[None]:
    yield
    PHASE_PROFILER.trace(None)


def operations(path: Path) -> set[str]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return {event["name"] for event in json.load(stream)["traceEvents"]}


def run_phase(name: str) -> None:
    """Two parts, of which the second one sorts."""
    with measure_phase(name):
        torch.ones(3, 3) @ torch.ones(3, 3)
        PHASE_PROFILER.tick()
        torch.ones(9).sort()
        PHASE_PROFILER.tick()


def test_each_phase_of_a_profiled_step_is_a_file(tmp_path: Path) -> None:
    run_phase("generate")
    PHASE_PROFILER.trace(f"{tmp_path}/step_3/rank_0_")
    for phase in ("generate", "update_actor", "generate"):
        run_phase(phase)
    PHASE_PROFILER.trace(None)
    run_phase("values")
    traces = sorted(path.name for path in tmp_path.glob("step_*/*"))
    assert traces == ["rank_0_generate.json.gz", "rank_0_update_actor.json.gz"]
    assert {"aten::mm", "aten::sort"} <= operations(tmp_path / "step_3" / "rank_0_update_actor.json.gz")


def test_a_long_phase_is_traced_in_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phase_profiler, "TRACED_S", 0.0)
    PHASE_PROFILER.trace(f"{tmp_path}/")
    run_phase("generate")
    found = operations(tmp_path / "generate.json.gz")
    assert "aten::mm" in found
    assert "aten::sort" not in found


def test_what_fails_leaves_no_trace_and_the_next_phase_has_one(tmp_path: Path) -> None:
    PHASE_PROFILER.trace(f"{tmp_path}/")
    with pytest.raises(ZeroDivisionError), measure_phase("generate"):
        raise ZeroDivisionError
    run_phase("update_actor")
    assert [path.name for path in tmp_path.iterdir()] == ["update_actor.json.gz"]


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("", encoding="utf-8")
    PHASE_PROFILER.trace(f"{tmp_path}/profile/rank_0_")
    run_phase("generate")
    assert f"{tmp_path}/profile/rank_0_generate.json.gz: no trace (" in caplog.text


class Group:
    """Stands for workers, and notes what they were told."""

    def __init__(self) -> None:
        self.told: list[str | None] = []

    def trace_phases(self, folder: str | None) -> None:
        self.told.append(folder)


def test_workers_trace_in_the_steps_that_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    profiled, group = ProfiledSteps(frozenset({2}), tmp_path), Group()
    with caplog.at_level("INFO"):
        for step in (1, 2, 3):
            with profiled.traced(step, [group]):
                group.told.append(f"train {step}")
    folder = str(tmp_path / "step_2")
    assert group.told == ["train 1", folder, "train 2", None, "train 3"]
    assert caplog.messages == [f"traces of step 2, for ui.perfetto.dev or chrome://tracing: {folder}"]
