"""A run whose updates are no longer finite ends with one line that names the step; its last checkpoint is good."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long


def run(overrides: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_run_that_is_no_longer_finite_stops_and_goes_on_from_the_last_checkpoint(
    small_run: list[str], tmp_path: Path
) -> None:
    # The KL's share of the loss overflows in every update.
    broken = ["actor_rollout_ref.actor.kl_loss_coef=1e39", "actor_rollout_ref.actor.max_nonfinite_updates=2"]
    small = [*small_run, "data.val_files=null", "trainer.save_freq=1", f"trainer.default_local_dir={tmp_path}"]
    stopped = run([*small, "trainer.total_training_steps=3", *broken])
    said = " ".join((stopped.stdout + stopped.stderr).split())
    assert stopped.returncode == 2, said
    assert re.search(r"step 2: 2 updates in a row were not finite \(last: loss (nan|inf)", said), said[-1000:]
    # What step 1 skipped had changed nothing: its checkpoint is as good as the start.
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8").strip() == "1"

    resumed = run([*small, "trainer.total_training_steps=2"])
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert (tmp_path / "global_step_2" / "actor" / ".metadata").exists()
