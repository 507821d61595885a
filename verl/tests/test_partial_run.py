"""A whole run with partial rollouts and dynamic sampling, and one that goes on from its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import lasting

from verl.checkpoints.folder import read_state

pytestmark = pytest.mark.slow


@pytest.fixture
def overrides(small_run: list[str], uneven_model_dir: Path) -> list[str]:
    """Three steps."""
    return [
        *small_run,
        f"actor_rollout_ref.model.path={uneven_model_dir}",
        "data.val_files=null",
        "data.train_batch_size=2",
        "data.max_response_length=48",
        "actor_rollout_ref.actor={ppo_mini_batch_size: 2, rollout_is: token, use_kl_loss: false}",
        "actor_rollout_ref.rollout={mode: partial, over_sampling: 1.0}",
        "algorithm.filter_groups.enable=true",
        "data.curriculum.enable=true",
        "trainer={n_gpus_per_node: 1, total_training_steps: 3, save_freq: 1}",
    ]


def test_a_run_goes_on_with_what_was_in_flight(overrides: list[str], start_run: Callable[..., Any], tmp_path: Path):
    whole = start_run(tmp_path / "whole", overrides).finish()
    expected, first = whole.metrics(), tmp_path / "whole" / "global_step_1"
    resumed = start_run(
        tmp_path / "resumed", [*overrides, "trainer.resume_mode=resume_path", f"trainer.resume_from_path={first}"]
    ).finish()
    state = read_state(first)["pool"]
    lengths = state["lengths"][~state["has_ended"]]
    assert lengths.sum() == expected[1]["rollout/carried_tokens"] > 0
    assert (lengths > 0).sum() == expected[1]["rollout/carried_responses"] > 0
    assert expected[2]["rollout/staleness_mean"] > 0 and expected[2]["rollout/staleness_max"] == 1
    assert all(row["reward/mixed_prompts"] == 1 for row in expected.values())
    assert expected[1]["curriculum/prompts_tried"] == 0 < expected[2]["curriculum/prompts_tried"]
    for step, row in resumed.metrics().items():
        kept = lasting(row)
        assert kept == {name: expected[step][name] for name in kept}
    assert sorted(resumed.metrics()) == [2, 3]
