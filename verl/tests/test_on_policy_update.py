"""A rollout batch that is one optimiser step needs no log-probs from before it: the update is the same bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_policy_update import make_batch, make_config
from tiny import adam, fsdp_section, ppo_defaults, tiny_lm
from torch import Tensor

from verl.models.joint_model import JointModel
from verl.models.loading import attention_for
from verl.optim.optimizers import JointOptimizer
from verl.trainer.ppo.metrics import log_prob_difference
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.placed_model import PlacedModel


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def updated(packed: bool, has_old_log_probs: bool, **actor_keys: object) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights and metrics after one update; old log-probs, where there are any, come from the same micro-batches."""
    keys = {"use_kl_loss": False, "tis_imp_ratio_cap": None, "entropy_coeff": 0.1, "ppo_micro_batch_size_per_gpu": 3}
    config = make_config(packed, **keys | actor_keys)
    lm = tiny_lm()
    lm.set_attn_implementation(attention_for(torch.float32, packed))
    placed = PlacedModel(JointModel(lm), fsdp_section(), lambda model: JointOptimizer(model, adam()))
    actor = DataParallelPPOActor(config, placed.model, placed.optimizer)
    batch = make_batch()
    before = actor.compute_log_prob(batch)["old_log_probs"]
    batch["rollout_log_probs"] = before + batch["rollout_noise"]
    if has_old_log_probs:
        batch["old_log_probs"] = before
    metrics = actor.update_policy(batch)
    expected = log_prob_difference(
        batch["rollout_log_probs"], before, batch["response_mask"] & batch["graded"][:, None]
    )
    return {name: p.detach().full_tensor() for name, p in placed.model.named_parameters()}, metrics | {
        f"expected/{name}": value for name, value in expected.items()
    }


@pytest.mark.parametrize(
    ("packed", "loss"),
    [(False, "ppo"), (True, "ppo"), (True, "gspo"), (True, "cispo")],
    ids=["padded", "packed", "packed-gspo", "packed-cispo"],
)
def test_the_update_is_the_same_bit_by_bit(one_rank: None, packed: bool, loss: str) -> None:
    (weights, metrics), (without, found) = updated(packed, True, loss=loss), updated(packed, False, loss=loss)
    assert all(torch.equal(weights[name], tensor) for name, tensor in without.items())
    assert {name: found[name] for name in metrics} == metrics
    for name in ("rollout/log_prob_diff_mean", "rollout/mismatch_kl"):
        assert name not in metrics
        assert found[name] == pytest.approx(found[f"expected/{name}"], rel=1e-5)
    assert found["actor/ppo_kl"] == found["actor/pg_clipfrac"] == 0


def test_a_second_optimiser_step_needs_them(one_rank: None) -> None:
    with pytest.raises(ValueError, match="2 optimiser steps on one batch need its old_log_probs"):
        updated(False, False, ppo_epochs=2)


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        ("data.train_batch_size=64", False),
        ("data.train_batch_size=128", True),
        ("actor_rollout_ref.actor.ppo_epochs=2", True),
        ("actor_rollout_ref.use_score=true", True),
        ("actor_rollout_ref.actor.tis_imp_ratio_cap=2", True),
        ("actor_rollout_ref.actor.rollout_is=sequence", True),
        ("actor_rollout_ref.actor.rollout_rs_geo_threshold=1.01", True),
        ("actor_rollout_ref.actor={loss: gspo, mask_truncated_responses: true}", False),
        ("algorithm.use_kl_in_reward=true", True),
    ],
)
def test_who_needs_them(change: str, needed: bool) -> None:
    config = ppo_defaults("actor_rollout_ref.use_score=false", "data.train_batch_size=64", change)
    assert config.actor_rollout_ref.actor.ppo_mini_batch_size == 64
    assert config.needs_old_log_probs is needed
