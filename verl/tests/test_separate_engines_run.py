"""Whole runs with a rollout engine in a process of its own, beside one that trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import lasting

from verl.checkpoints.folder import LATEST_FILE

pytestmark = pytest.mark.slow

WAITING = ["trainer.rollout_gpus=1", "actor_rollout_ref.rollout.max_staleness=0"]
AHEAD = ["trainer.rollout_gpus=1", "actor_rollout_ref.actor.tis_imp_ratio_cap=2.0"]
PARTIAL_WITH_A_CRITIC = [
    *AHEAD,
    "actor_rollout_ref.rollout.mode=partial",
    "data.max_response_length=48",
    "algorithm.adv_estimator=gae",
    "critic.optim.lr=1e-3",
]


@pytest.fixture
def overrides(small_run: list[str]) -> list[str]:
    """Three steps in short."""
    return [
        *small_run,
        "data.train_batch_size=2",
        "data.curriculum.enable=true",
        "data.max_response_length=12",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.rollout.check_weight_sync=true",
        "actor_rollout_ref.rollout.val_kwargs.n=1",
        "trainer={n_gpus_per_node: 1, total_training_steps: 3, save_freq: 1, test_freq: 2, val_before_train: false}",
    ]


def test_engines_that_wait_give_the_metrics_of_those_that_share(
    overrides: list[str], start_run: Callable[..., Any], tmp_path: Path
) -> None:
    without_saving = [*overrides, "trainer.save_freq=-1", "trainer.total_training_steps=2"]
    runs = {"shared": [], "separate": WAITING}
    rows = {
        name: start_run(tmp_path / name, [*without_saving, *more]).finish().metrics() for name, more in runs.items()
    }
    assert {step: lasting(row) for step, row in rows["separate"].items()} == {
        step: lasting(row) for step, row in rows["shared"].items()
    }
    assert sorted(rows["shared"]) == [1, 2] and "val/pass@1" in rows["separate"][2]
    # Two prompts of eight in the first step.
    assert [rows["shared"][step]["curriculum/prompts_tried"] for step in (1, 2)] == [0, 0.25]


@pytest.mark.long
@pytest.mark.parametrize("is_partial", [False, True])
def test_one_step_off_goes_on_from_where_it_was_killed(
    is_partial: bool, overrides: list[str], uneven_model_dir: Path, start_run: Callable[..., Any], tmp_path: Path
) -> None:
    more = PARTIAL_WITH_A_CRITIC if is_partial else AHEAD
    overrides = [*overrides, f"actor_rollout_ref.model.path={uneven_model_dir}"]
    whole = start_run(tmp_path / "whole", [*overrides, *more]).finish().metrics()
    staleness = [whole[step]["rollout/staleness_max"] for step in (1, 2, 3)]
    assert staleness[:2] == [0, 1] and (staleness[2] > 1) == is_partial
    assert (whole[1].get("rollout/carried_tokens", 0) > 0) == is_partial
    # What is drawn ahead knows of the steps before the last one.
    assert (
        [whole[step]["curriculum/prompts_tried"] for step in (1, 2)] == [0, 0] < [whole[3]["curriculum/prompts_tried"]]
    )
    assert whole[3]["actor/grad_norm"] > 0 and all("timing_s/rollout_wait" in row for row in whole.values())
    killed = start_run(folder := tmp_path / "killed", [*overrides, *more])
    killed.kill_when(lambda: (folder / LATEST_FILE).exists())
    resumed = start_run(folder, [*overrides, *more]).finish()
    assert "going on from" in resumed.log()
    assert {step: lasting(row) for step, row in resumed.metrics().items()} == {
        step: lasting(row) for step, row in whole.items()
    }
