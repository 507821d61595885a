"""Whole runs with a remote folder: killed machines, slow graders, and data that changed under a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import lasting

pytestmark = pytest.mark.long

SLOW_REWARD = """
import time

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    time.sleep(0.1)
    return {"score": float(sum(map(ord, solution_str)) % 2), "length": len(solution_str)}
"""


@pytest.fixture(scope="module")
def overrides(small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two steps an epoch, a checkpoint after each, one of them kept, copied to `remote`."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "reward.py").write_text(SLOW_REWARD, encoding="utf-8")
    return [
        *small_run,
        "trainer.n_gpus_per_node=1",
        "data.val_files=null",
        "trainer.save_freq=1",
        "trainer.max_actor_ckpt_to_keep=1",
        f"custom_reward_function.path={folder}/reward.py",
        f"trainer.default_hdfs_dir=file://{folder}/remote",
    ]


def _grading_meanwhile(metrics: dict[str, float]) -> float:
    """Seconds of grading for which nobody waited."""
    return metrics["timing_s/reward"] - metrics["timing_s/reward_wait"]


def test_a_run_moves_to_another_machine(
    overrides: list[str], start_run: Callable[..., Any], tmp_path: Path, training_files: Path
) -> None:
    remote = Path(overrides[-1].partition("file://")[2])
    first = start_run(tmp_path / "first", [*overrides, "trainer.total_training_steps=2"]).finish()
    assert sorted(path.name for path in remote.iterdir()) == ["global_step_2", "latest_checkpointed_iteration.txt"]
    second = start_run(
        tmp_path / "second",
        [*overrides, "trainer.total_training_steps=4", "reward_model.launch_reward_fn_async=false"],
    ).finish()
    assert "fetching file://" in second.log() and "step 2 is done, which ended epoch 1: epoch 2 begins" in second.log()
    assert (remote / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8") == "4"
    whole = start_run(
        tmp_path / "whole",
        [*overrides[:-1], "trainer.total_training_steps=4", "trainer.async_save=false"],
    ).finish()
    moved = {**first.metrics(), **second.metrics()}
    assert {step: lasting(row) for step, row in moved.items()} == {
        step: lasting(row) for step, row in whole.metrics().items()
    }
    assert all("reward_extra/length" in row for row in moved.values())
    for row in first.metrics().values():
        assert _grading_meanwhile(row) > 0.9 * (row["timing_s/old_log_prob"] + row["timing_s/ref"]) > 0
    for row in second.metrics().values():
        assert _grading_meanwhile(row) < 0.05

    data = tmp_path / "changed.parquet"
    data.write_bytes((training_files / "val.parquet").read_bytes())
    changed = [*overrides[:-1], f"data.train_files={data}", "trainer.total_training_steps=5"]
    assert "changed.parquet has changed" in start_run(tmp_path / "whole", changed).fail()
    accepted = start_run(tmp_path / "whole", [*changed, "trainer.resume_with_new_data=true"]).finish()
    assert sorted(accepted.metrics()) == [1, 2, 3, 4, 5]
