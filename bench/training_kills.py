"""A training run killed at random moments and gone on with, against one that was left alone.

    python bench/training_kills.py [--kills 10] [--seed 0]

A random Qwen3 is trained for a few steps by vLLM, GRPO and the score loss, with a checkpoint after each step that is
written in the background. The last line is one JSON object:

    training_kills    how many
    lost              steps of which the killed run has no metrics
    silently_wrong    steps whose metrics (but times) are not those of the run left alone, to the last bit
    hung              whether it did not end well
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import datasets
import typer

from verl.utils.tracking import METRICS_FILE
from xbai.benchmarks.rows import training_row
from xbai.benchmarks.tiny_model import write_tiny_model

STEPS = 40
RUN_FOR_S = 900.0
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(sum(map(ord, solution_str)) % 2)
"""
OVERRIDES = (
    *("data.val_files=null", "data.train_batch_size=4", "data.max_prompt_length=64", "data.max_response_length=24"),
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.actor.optim.lr=1e-3",
    "actor_rollout_ref.score.agreement_weighting=false",
    *("actor_rollout_ref.rollout.n=4", "actor_rollout_ref.rollout.dtype=float32"),
    *("reward_model.num_workers=1", "trainer.device=cpu", "trainer.n_gpus_per_node=1"),
    *("trainer.save_freq=1", "trainer.test_freq=-1", "trainer.max_actor_ckpt_to_keep=2"),
    f"trainer.total_training_steps={STEPS}",
)
Metrics = dict[int, dict[str, float]]


class TrainingRun:
    """A run in a folder, which can be started again and again.

    Args:
        folder: of its checkpoints, metrics and log.
        shared: what `write_inputs` has written.
    """

    def __init__(self, folder: Path, shared: Path) -> None:
        self._folder = folder
        folder.mkdir()
        inputs = {
            "data.train_files": shared / "train.parquet",
            "custom_reward_function.path": shared / "reward.py",
            "actor_rollout_ref.model.path": shared / "model",
            "trainer.default_local_dir": folder,
        }
        self._command = [*OVERRIDES, *(f"{key}={path}" for key, path in inputs.items())]

    def start(self) -> subprocess.Popen:
        """In a process group of its own."""
        quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        with (self._folder / "log.txt").open("a", encoding="utf-8") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "verl.trainer.main_ppo", *self._command],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **quiet},
            )

    def finish(self) -> bool:
        """Run to the end; whether it was a good one, in time."""
        process = self.start()
        try:
            return process.wait(RUN_FOR_S) == 0
        except subprocess.TimeoutExpired:
            _kill(process)
            return False

    def kill_after(self, seconds: float) -> bool:
        """Run, and kill everything so much later; whether there still was something to kill."""
        process = self.start()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            _kill(process)
            return True
        return False

    def metrics(self) -> Metrics:
        """By step, without those of time and memory."""
        path = self._folder / METRICS_FILE
        rows = map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.exists() else [])
        return {
            row["step"]: {name: value for name, value in row.items() if not name.startswith(("timing_s/", "perf/"))}
            for row in rows
        }


def _kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write_inputs(folder: Path) -> None:
    """Model, prompts and reward."""
    write_tiny_model(folder / "model")
    rows = [
        training_row("make10", [{"role": "user", "content": f"Make 10 from {n} 2 3 4"}], "", "math", index=n)
        for n in range(8)
    ]
    datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")


def kill_training(folder: Path, kills: int, seed: int = 0) -> dict[str, int]:
    """Kill a run so often, in an empty folder; see the module for what is returned."""
    chance = random.Random(seed)
    write_inputs(folder)
    alone, killed = TrainingRun(folder / "alone", folder), TrainingRun(folder / "killed", folder)
    started = time.monotonic()
    ends_well = alone.finish()
    whole_s = time.monotonic() - started
    count = 0
    # Also before its first step; most runs of the length of this one would end before.
    while ends_well and count < kills and killed.kill_after(chance.uniform(0.1, 0.5) * whole_s):
        count += 1
    ends_well = ends_well and killed.finish()
    expected, found = alone.metrics(), killed.metrics()
    return {
        "training_kills": count,
        "lost": len(expected.keys() - found.keys()),
        # As text: a metric that is undefined equals itself.
        "silently_wrong": sum(
            json.dumps(found[step]) != json.dumps(row) for step, row in expected.items() if step in found
        ),
        "hung": int(not ends_well),
    }


def main(
    kills: Annotated[int, typer.Option(min=1, help="how many; the run may end before")] = 10,
    seed: Annotated[int, typer.Option(help="of the moments")] = 0,
) -> None:
    """Kill a training run."""
    with tempfile.TemporaryDirectory() as folder:
        typer.echo(json.dumps(kill_training(Path(folder), kills, seed)))


if __name__ == "__main__":
    typer.run(main)
