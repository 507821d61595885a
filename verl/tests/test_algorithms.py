"""Every algorithm in the trainer's own loop: what its metrics must be follows from the samples that the run wrote."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from verl import DataProto
from verl.trainer.ppo.ray_trainer import add_baseline
from verl.utils.tracking import METRICS_FILE
from verl.workers.reward_manager import Reward

MAX_RESPONSE = 24
Sample = dict[str, Any]
Metrics = dict[int, dict[str, float]]


def train(folder: Path, overrides: list[str]) -> Metrics:
    """Run the trainer to its end; returns its metrics by step."""
    settings = [
        f"trainer.default_local_dir={folder}",
        f"trainer.rollout_data_dir={folder}/samples",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", *overrides, *settings],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = map(json.loads, (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines())
    return {row.pop("step"): row for row in rows}


@pytest.fixture
def run(small_run: list[str], tmp_path: Path) -> Callable[..., Metrics]:
    """`run("key=value", ...) -> metrics by step` of two steps, saving nothing."""

    def start(*overrides: str) -> Metrics:
        return train(tmp_path, [*small_run, "trainer.total_training_steps=2", "trainer.save_freq=-1", *overrides])

    return start


def samples(folder: Path, step: int) -> list[Sample]:
    return [
        json.loads(line) for line in (folder / "samples" / f"{step}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def by_prompt(batch: list[Sample]) -> list[list[Sample]]:
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in batch:
        groups[sample["prompt"]].append(sample)
    return list(groups.values())


def assert_advantages(metrics: dict[str, float], batch: list[Sample], advantages: list[float]) -> None:
    """The logged spread, over tokens, of one advantage for each response; some of them must not be 0."""
    tokens = [sample["tokens"] for sample in batch]
    mean = sum(a * t for a, t in zip(advantages, tokens)) / sum(tokens)
    expected = {"advantages/mean": mean, "advantages/max": max(advantages), "advantages/min": min(advantages)}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert max(advantages) > 0.1 > -0.1 > min(advantages)


def less_mean_of_others(batch: list[Sample]) -> list[float]:
    advantages = []
    for group in by_prompt(batch):
        total = sum(sample["reward"] for sample in group)
        advantages += [s["reward"] - (total - s["reward"]) / (len(group) - 1) for s in group]
    return advantages


def less_mean(batch: list[Sample], over_std: bool) -> list[float]:
    advantages = []
    for group in by_prompt(batch):
        rewards = [sample["reward"] for sample in group]
        scale = statistics.stdev(rewards) + 1e-6 if over_std else 1.0
        advantages += [(reward - statistics.fmean(rewards)) / scale for reward in rewards]
    return advantages


def per_sequence(batch: list[Sample], advantages: list[float]) -> float:
    """The policy loss of `seq-mean-token-sum` where every ratio is 1."""
    return -statistics.fmean(a * sample["tokens"] for a, sample in zip(advantages, batch))


def per_token(batch: list[Sample], advantages: list[float]) -> float:
    """The policy loss of `token-mean` where every ratio is 1."""
    return len(batch) * per_sequence(batch, advantages) / sum(sample["tokens"] for sample in batch)


def test_a_greedy_response_without_a_grade_masks_its_prompt() -> None:
    rewards = torch.tensor([[0.0, 0.0], [0.0, 0.75], [0.0, 0.25]])
    graded = torch.tensor([False, True, True])
    baseline = Reward(rewards, torch.zeros(3), graded, {}, {})
    batch = DataProto.from_dict({"graded": torch.tensor([True, True, True, False, True, True])})
    metrics = add_baseline(batch, baseline)
    assert batch.batch["graded"].tolist() == [False, False, True, False, True, True]
    assert batch.batch["baselines"][2:].tolist() == [0.75, 0.75, 0.25, 0.25]
    assert metrics == {"reward/baseline": 0.5, "reward/ungraded_baselines": 1.0}


@pytest.mark.long
@pytest.mark.parametrize("over_std", [True, False])
def test_grpo(run: Callable[..., Metrics], tmp_path: Path, over_std: bool) -> None:
    kind = "abs" if over_std else "mse"
    overrides = f"algorithm.norm_adv_by_std_in_grpo={over_std}", f"actor_rollout_ref.actor.kl_loss_type={kind}"
    metrics = run(*overrides, "actor_rollout_ref.actor.kl_loss_coef=0.5")
    for step in (1, 2):
        batch = samples(tmp_path, step)
        advantages = less_mean(batch, over_std)
        assert_advantages(metrics[step], batch, advantages)
        assert metrics[step]["actor/pg_loss"] == pytest.approx(per_token(batch, advantages), abs=1e-4)
    after = metrics[2]
    assert metrics[1]["actor/kl_loss"] == pytest.approx(0, abs=1e-5) and after["actor/kl_loss"] > 1e-3
    total = after["actor/pg_loss"] + 0.5 * after["actor/kl_loss"] + after["score/loss"]
    assert after["actor/loss"] == pytest.approx(total, abs=1e-5)


@pytest.mark.long
def test_grpo_of_one_update_a_batch_without_a_head_computes_no_old_log_probs(run: Callable[..., Metrics]) -> None:
    metrics = run("actor_rollout_ref.use_score=false")
    for row in metrics.values():
        assert "timing_s/old_log_prob" not in row and "score/loss" not in row
        assert row["rollout/log_prob_diff_mean"] < 1e-4
        assert row["actor/ppo_kl"] == row["actor/pg_clipfrac"] == 0 < row["actor/grad_norm"]
    assert metrics[1]["actor/kl_loss"] == pytest.approx(0, abs=1e-5) and metrics[2]["actor/kl_loss"] > 1e-3


@pytest.mark.long
def test_rloo_with_importance_weights_and_entropy(run: Callable[..., Metrics], tmp_path: Path) -> None:
    metrics = run(
        "algorithm.adv_estimator=rloo",
        "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum",
        # Engine and actor agree in float32: a cap below 1 truncates every weight, and leaves a quarter of the loss.
        "actor_rollout_ref.actor.tis_imp_ratio_cap=0.25",
        "actor_rollout_ref.actor.entropy_coeff=0.01",
        "actor_rollout_ref.actor.use_kl_loss=false",
    )
    for step in (1, 2):
        batch, found = samples(tmp_path, step), metrics[step]
        advantages = less_mean_of_others(batch)
        assert_advantages(found, batch, advantages)
        assert found["actor/pg_loss"] == pytest.approx(0.25 * per_sequence(batch, advantages), abs=1e-3)
        assert found["rollout_is/truncated_fraction"] == 1 and found["rollout_is/effective_sample_size"] == 1
        assert found["rollout_is/mean"] == pytest.approx(1, abs=1e-3)
        tokens = statistics.fmean(sample["tokens"] for sample in batch)
        assert found["actor/entropy_loss"] == pytest.approx(found["actor/entropy"] * tokens, rel=1e-3)
        total = found["actor/pg_loss"] - 0.01 * found["actor/entropy_loss"] + found["score/loss"]
        assert found["actor/loss"] == pytest.approx(total, abs=1e-4)
        assert "timing_s/ref" not in found


@pytest.mark.long
def test_gspo_of_responses_that_ended_weighed_as_wholes(run: Callable[..., Metrics], tmp_path: Path) -> None:
    longest = 100
    metrics = run(
        # So long that some of the random model's responses end.
        f"data.max_response_length={longest}",
        "actor_rollout_ref.use_score=false",
        "actor_rollout_ref.actor={loss: gspo, mask_truncated_responses: true, use_kl_loss: false}",
        # Engine and actor agree in float32: every weight is 1, and so is every mean.
        "actor_rollout_ref.actor={rollout_is: sequence, rollout_is_mode: mask, rollout_rs_geo_threshold: 1.01}",
    )
    for step in (1, 2):
        batch, found = samples(tmp_path, step), metrics[step]
        advantages = less_mean(batch, over_std=True)
        assert_advantages(found, batch, advantages)
        ended = [a for a, sample in zip(advantages, batch) if sample["tokens"] < longest]
        assert 0 < len(ended) < len(batch) and found["response_length/truncated"] == 1 - len(ended) / len(batch)
        assert found["actor/responses_in_policy_loss"] == len(ended) / len(batch)
        assert found["actor/pg_loss"] == pytest.approx(-statistics.fmean(ended), abs=1e-3)
        assert found["rollout_is/effective_sample_size"] == pytest.approx(1, abs=1e-3)
        assert found["rollout_rs/masked_fraction"] == found["rollout_is/masked_fraction"] == 0


@pytest.mark.long
def test_remax_with_full_kl_and_length_penalty(run: Callable[..., Metrics], tmp_path: Path) -> None:
    metrics = run(
        "algorithm.adv_estimator=remax",
        "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean",
        "actor_rollout_ref.actor.kl_loss_type=full",
        "actor_rollout_ref.actor.kl_loss_coef=0.5",
        "trainer.length_penalty=true",
        "trainer.length_penalty_coeff=0.5",
    )
    for step in (1, 2):
        batch, found = samples(tmp_path, step), metrics[step]
        for sample in batch:
            assert sample["reward"] == pytest.approx(sample["correct"] - sample["penalty"], abs=1e-5)
        assert all(len({sample["baseline"] for sample in group}) == 1 for group in by_prompt(batch))
        for group in by_prompt(batch):
            assert len({sample["tokens"] for sample in group}) == 1 or max(each["penalty"] for each in group) == 0.25
        baselines = [group[0]["baseline"] for group in by_prompt(batch)]
        assert found["reward/baseline"] == pytest.approx(statistics.fmean(baselines), abs=1e-5)
        advantages = [sample["reward"] - sample["baseline"] for sample in batch]
        assert_advantages(found, batch, advantages)
        assert found["actor/pg_loss"] == pytest.approx(-statistics.fmean(advantages), abs=1e-4)
        assert "timing_s/ref" not in found, "the update computes it"
    assert metrics[1]["actor/kl_loss"] == pytest.approx(0, abs=1e-5) and metrics[2]["actor/kl_loss"] > 1e-3


@pytest.mark.long
def test_reinforce_plus_plus_with_adaptive_kl_and_overlong_penalty(run: Callable[..., Metrics], tmp_path: Path) -> None:
    metrics = run(
        "algorithm.adv_estimator=reinforce_plus_plus",
        "algorithm.use_kl_in_reward=true",
        "algorithm.kl_penalty=low_var_kl",
        "algorithm.kl_ctrl={type: adaptive, kl_coef: 0.5, horizon: 160, target_kl: 0.1}",
        "actor_rollout_ref.actor.use_kl_loss=false",
        "reward_model.reward_manager=dapo",
        "reward_model.overlong_buffer={len: 12, penalty_factor: 0.5}",
    )
    # No KL before the first update, so the coefficient falls by its largest step: 0.2 * 16 responses / 160.
    assert metrics[1]["reward/kl"] == pytest.approx(0, abs=1e-6)
    assert [metrics[step]["reward/kl_coef"] for step in (1, 2)] == pytest.approx([0.5, 0.5 * 0.98])
    batch = samples(tmp_path, 1)
    for sample in batch:
        excess = min(max((sample["tokens"] - (MAX_RESPONSE - 12)) / 12, 0), 1)
        assert sample["reward"] == pytest.approx(sample["correct"] - 0.5 * excess, abs=1e-5)
    # Undiscounted and without KL, the return of every token is its response's reward.
    rewards = [sample["reward"] for sample in batch for _ in range(sample["tokens"])]
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    assert_advantages(metrics[1], batch, [(sample["reward"] - mean) / std for sample in batch])
    assert metrics[2]["reward/kl"] > 1e-3
    # The KL is taken off along the way: a token's return holds what is still to come of it.
    tokens = [sample["reward"] for sample in samples(tmp_path, 2) for _ in range(sample["tokens"])]
    assert metrics[2]["returns/mean"] < statistics.fmean(tokens) - 1e-3
    assert metrics[2]["advantages/mean"] == pytest.approx(0, abs=1e-4)


@pytest.fixture(scope="module")
def gae(small_run: list[str]) -> list[str]:
    """Overrides of three steps with a critic, the first of which trains it alone; saved after the second."""
    return [
        *small_run,
        "algorithm.adv_estimator=gae",
        "algorithm.gamma=0.99",
        "algorithm.lam=0.95",
        "algorithm.use_kl_in_reward=true",
        "algorithm.kl_penalty=full",
        "critic.optim.lr=1e-3",
        "critic.forward_micro_batch_size_per_gpu=3",
        "critic.ppo_epochs=1",
        "trainer.critic_warmup=1",
        "trainer.total_training_steps=3",
        "trainer.save_freq=2",
        "actor_rollout_ref.actor.use_kl_loss=false",
        "actor_rollout_ref.actor.ppo_epochs=3",
        "actor_rollout_ref.actor.clip_ratio_low=0.01",
        "actor_rollout_ref.actor.clip_ratio_high=0.02",
        "actor_rollout_ref.actor.clip_ratio_c=1.03",
    ]


@pytest.fixture(scope="module")
def gae_run(gae: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Metrics]:
    """Its folder and metrics."""
    folder = tmp_path_factory.mktemp("gae")
    return folder, train(folder, gae)


@pytest.mark.long
def test_gae_warms_up_and_clips(gae_run: tuple[Path, Metrics]) -> None:
    folder, metrics = gae_run
    assert "actor/pg_loss" not in metrics[1] and "actor/pg_loss" in metrics[2]
    assert metrics[1]["critic/vpred_mean"] == pytest.approx(0, abs=0.05)
    rewards = [metrics[step]["reward/mean"] for step in (1, 2, 3)]
    values = [metrics[step]["critic/vpred_mean"] for step in (1, 2, 3)]
    assert values[0] < values[1] < values[2], f"values {values} move towards rewards {rewards}"
    for step, row in metrics.items():
        assert row["critic/grad_norm"] > 0 and row["critic/explained_variance"] < 1
        assert row["advantages/mean"] == pytest.approx(0, abs=1e-4) and row["advantages/max"] > 0.1
        assert row["reward/kl_coef"] == 0.001, step
    assert [metrics[step]["reward/kl"] for step in (1, 2)] == pytest.approx([0, 0], abs=1e-5)
    assert metrics[3]["reward/kl"] > 1e-3
    # Ranges this narrow are left in the later epochs.
    assert metrics[2]["actor/pg_clipfrac"] > 0 and metrics[2]["actor/pg_clipfrac_lower"] > 0

    checkpoint = folder / "global_step_2"
    assert (checkpoint / "critic" / ".metadata").exists() and (checkpoint / "actor" / ".metadata").exists()


@pytest.mark.long
def test_gae_resumes_exactly(gae: list[str], gae_run: tuple[Path, Metrics], tmp_path: Path) -> None:
    folder, metrics = gae_run
    resume = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={folder}/global_step_2"]
    resumed = train(tmp_path, [*gae, *resume])
    assert list(resumed) == [3]
    costs = ("timing_s/", "perf/")
    lasting = {name: value for name, value in metrics[3].items() if not name.startswith(costs)}
    assert {name: value for name, value in resumed[3].items() if not name.startswith(costs)} == lasting
