"""A whole small training set-up: a random model, prompts, and a reward that random text gets half of the time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from verl.utils.tracking import METRICS_FILE

PATIENCE_S = 600
PARITY_REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(sum(map(ord, solution_str)) % 2)
"""


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of this process alone."""
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def training_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train.parquet` (8 prompts), `val.parquet` (4) and `reward.py`."""
    folder = tmp_path_factory.mktemp("training")
    rows = [
        {
            "data_source": "make10",
            "prompt": [{"role": "user", "content": f"Make 10 from {number} 2 3 4"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": f"{number} 2 3 4"},
            "extra_info": {"index": number},
        }
        for number in range(8)
    ]
    datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    datasets.Dataset.from_list(rows[:4]).to_parquet(folder / "val.parquet")
    (folder / "reward.py").write_text(PARITY_REWARD, encoding="utf-8")
    return folder


@pytest.fixture
def uneven_model_dir(make_tiny_model: Callable[..., Path]) -> Path:
    """A model that often ends its responses, at very different lengths."""
    folder = make_tiny_model()
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[model.config.eos_token_id] *= 4
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_run(training_files: Path, tiny_model_dir: Path) -> list[str]:
    """Overrides of a run that two CPU processes finish in seconds."""
    return [
        f"data.train_files={training_files}/train.parquet",
        f"data.val_files={training_files}/val.parquet",
        f"custom_reward_function.path={training_files}/reward.py",
        f"actor_rollout_ref.model.path={tiny_model_dir}",
        "data.train_batch_size=4",
        "data.max_prompt_length=64",
        "data.max_response_length=24",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.score.agreement_weighting=false",
        "actor_rollout_ref.rollout.name=hf",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.rollout.dtype=float32",
        "actor_rollout_ref.rollout.val_kwargs.n=2",
        "reward_model.num_workers=1",
        "trainer.device=cpu",
        "trainer.n_gpus_per_node=2",
    ]


class TrainerRun:
    """One start of a trainer, in a process group of its own.

    Args:
        folder: of checkpoints, metrics and log.
        command: the module and its arguments, as `python -m` takes them.
    """

    def __init__(self, folder: Path, command: list[str]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._log = (folder / "log.txt").open("a", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"},
        )

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        return self._process.pid

    def finish(self) -> TrainerRun:
        """Wait for a good end."""
        assert self._end() == 0, self.log()
        return self

    def fail(self) -> str:
        """Wait for an end by a mistake of the user's; returns the line that says which."""
        assert self._end() == 2, self.log()
        return self.log().splitlines()[-1]

    def kill_when(self, happened: Callable[[], bool]) -> None:
        """SIGKILL the whole process group as soon as `happened`."""
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < deadline, f"what to kill it at: not within {PATIENCE_S} s\n{self.log()}"
            time.sleep(0.001)
        self._kill()

    def _kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _end(self) -> int:
        try:
            return self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._kill()
            raise AssertionError(f"the run has not ended within {PATIENCE_S} s\n{self.log()}") from None

    def log(self) -> str:
        """What it printed."""
        return (self.folder / "log.txt").read_text(encoding="utf-8")

    def metrics(self) -> dict[int, dict[str, float]]:
        """Logged metrics by step; of a run that goes on, without a line that is being written."""
        path = self.folder / METRICS_FILE
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return {row.pop("step"): row for row in (json.loads(line) for line in lines if line.endswith("\n"))}


@pytest.fixture(scope="session")
def start_run() -> Callable[[Path, list[str]], TrainerRun]:
    """`start_run(folder, overrides)` starts the RL trainer."""

    def start(folder: Path, overrides: list[str]) -> TrainerRun:
        return TrainerRun(folder, ["verl.trainer.main_ppo", *overrides, f"trainer.default_local_dir={folder}"])

    return start


@pytest.fixture(scope="session")
def start_sft() -> Callable[[Path, list[str]], TrainerRun]:
    """`start_sft(folder, overrides, ranks=2)` starts supervised fine-tuning by torchrun; its output is `folder/out`."""

    def start(folder: Path, overrides: list[str], ranks: int = 2) -> TrainerRun:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m", "verl.trainer.main_sft"]
        places = {"default_local_dir": folder, "log_dir": folder, "output_dir": folder / "out"}
        return TrainerRun(folder, [*launcher, *overrides, *(f"trainer.{key}={path}" for key, path in places.items())])

    return start
