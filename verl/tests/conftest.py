"""A whole small training set-up: a random model, prompts, and a reward that random text gets half of the time."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

PARITY_REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(sum(map(ord, solution_str)) % 2)
"""


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
    (folder / "reward.py").write_text(PARITY_REWARD)
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
