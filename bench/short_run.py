"""A few steps of this trainer on a finished quickstart's base and problems, as a run of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from machine import ROOT

from xbai.errors import UserError

PHASES = ("weight_sync", "generate", "old_log_prob", "ref", "update_actor")
"""Of a step, those that its workers compute, one after the other."""


@dataclass(frozen=True)
class ShortRun:
    """What is trained, on what, and how long; by one process unless it is told otherwise, all settings that are not
    here at their defaults."""

    quickstart: Path
    steps: int
    """That count."""
    threads: int
    warm_ups: int = 1
    """Steps before them, in which what is compiled or cached for later is."""
    last_ones: int = 0
    """Steps after them."""
    prompts: int = 32
    samples: int = 8
    response_tokens: int = 256
    learning_rate: float = 3e-4
    kl_coef: float = 0.1

    @property
    def base(self) -> Path:
        """The model to start from."""
        return self.quickstart.resolve() / "base"

    @property
    def problems(self) -> Path:
        """Those to train on."""
        return self.quickstart.resolve() / "data/make10_train.parquet"

    def check(self) -> None:
        """Raise a `UserError` where the quickstart is not there."""
        if not ((self.base / "config.json").is_file() and self.problems.is_file()):
            raise UserError(f"{self.quickstart}: no finished quickstart (bash scripts/quickstart.sh makes one)")

    def run(self, seed: int, *overrides: str) -> list[dict[str, float]]:
        """The metrics of the steps that count."""
        with tempfile.TemporaryDirectory() as folder:
            settings = {
                "trainer.device": "cpu",
                "trainer.n_gpus_per_node": 1,
                "trainer.seed": seed,
                "trainer.total_training_steps": self.warm_ups + self.steps + self.last_ones,
                "trainer.val_before_train": "false",
                "trainer.save_freq": -1,
                "trainer.logger": "[file]",
                "trainer.default_local_dir": folder,
                "data.train_files": self.problems,
                "data.train_batch_size": self.prompts,
                "data.max_prompt_length": 32,
                "data.max_response_length": self.response_tokens,
                "actor_rollout_ref.model.path": self.base,
                "actor_rollout_ref.model.use_remove_padding": "true",
                "actor_rollout_ref.model.enable_gradient_checkpointing": "false",
                "actor_rollout_ref.actor.ppo_mini_batch_size": self.prompts,
                "actor_rollout_ref.actor.use_dynamic_bsz": "true",
                "actor_rollout_ref.actor.optim.lr": self.learning_rate,
                "actor_rollout_ref.actor.kl_loss_coef": self.kl_coef,
                "actor_rollout_ref.ref.log_prob_use_dynamic_bsz": "true",
                "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz": "true",
                "actor_rollout_ref.rollout.n": self.samples,
                "actor_rollout_ref.rollout.dtype": "float32",
            }
            given = [f"{key}={value}" for key, value in settings.items()]
            run_until_done([sys.executable, "-m", "verl.trainer.main_ppo", *given, *overrides], self.threads)
            lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines[self.warm_ups :][: self.steps]]


def steps_of_a_turn(steps: int, turns: int) -> int:
    """So many of all.

    Raises:
        UserError: turns that cannot have equally many.
    """
    if steps % turns:
        raise UserError(f"--steps {steps} must be a multiple of --turns {turns}, which have equally many")
    return steps // turns


def outside_share(row: dict[str, float]) -> float:
    """Of a step's seconds, what no phase of its workers has: driver, Ray, and what is in the way of the batch."""
    return 1 - sum(row.get(f"timing_s/{phase}", 0.0) for phase in PHASES) / row["timing_s/step"]


def run_until_done(command: Sequence[str], threads: int, *folders: Path) -> None:
    """Run a command on this repository's packages, and those in `folders`, on the CPU.

    Raises:
        UserError: it failed; with the end of what it said.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "verl", *folders))),
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command[:3])} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
