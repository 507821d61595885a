"""What a GPU computes by default, bfloat16 under float32 weights, against float32: every way to run policy, reference
and critic, on one, two and four FSDP2 ranks (gloo).

This file is also the program that the ranks run (see `launch`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import test_critic
import test_joint_update
import torch
import torch.distributed as dist
from tiny import PROMPT, fsdp_section, tiny_lm
from transformers import Qwen3ForCausalLM

from verl.models.fsdp import init_distributed
from verl.models.joint_model import JointModel
from verl.models.loading import attention_for
from verl.models.reference import ReferencePolicy
from verl.models.ulysses import sequence_parallel_group
from verl.optim.optimizers import JointOptimizer, Optimizers
from verl.trainer.config.schema import TrainedPlacement
from verl.workers.actor.dp_actor import DataParallelPPOActor, PolicyLogProbs
from verl.workers.critic import DataParallelPPOCritic
from verl.workers.placed_model import PlacedModel
from xbai.sprm import ScoreHead

VARIANTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padded, full KL": {"kl": "full"},
    "packed": {"packed": True},
    "packed, full KL": {"packed": True, "kl": "full"},
    "checkpointed": {"packed": True, "checkpointing": True},
    "kept whole": {"packed": True, "kl": "full", "fsdp_config": {"reshard_after_forward": False}},
    "rounded logits": {"packed": True, "logits_dtype": None},
    "GSPO": {"packed": True, "loss": "gspo"},
    "CISPO": {"packed": True, "loss": "cispo"},
    "sequence parallel": {"packed": True, "kl": "full", "sp_size": 2},
    "sequence parallel, GSPO": {"packed": True, "loss": "gspo", "sp_size": 2},
    "hybrid": {"packed": True, "fsdp_config": {"fsdp_size": 2}},
}
DEFAULTS = {
    "packed": False,
    "loss": "ppo",
    "kl": "low_var_kl",
    "sp_size": 1,
    "checkpointing": False,
    "logits_dtype": torch.float32,
}
RANKS = {name: 2 if "sp_size" in keys else 4 if "fsdp_config" in keys else 1 for name, keys in VARIANTS.items()}
DTYPES = ("float32", "bfloat16")
TEMPERATURE = test_joint_update.make_config().rollout.temperature
LOSSES = ("actor/loss", "actor/pg_loss", "actor/kl_loss", "actor/entropy_loss", "score/loss", "critic/vf_loss")


def make_lm(packed: bool, checkpointing: bool, seed: int = 0) -> Qwen3ForCausalLM:
    lm = tiny_lm(seed)
    lm.set_attn_implementation(attention_for(torch.float32, packed))
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return lm


def rows_of_rank(batch: Any, sp_size: int) -> Any:
    shares, share = dist.get_world_size() // sp_size, dist.get_rank() // sp_size
    return {name: column.chunk(shares)[share] for name, column in batch.items()}


def policy_flow(
    fsdp_config: TrainedPlacement,
    packed: bool,
    loss: str,
    kl: str,
    sp_size: int,
    checkpointing: bool,
    logits_dtype: torch.dtype,
) -> dict[str, Any]:
    """Log-probs of policy and reference, and an update, as the workers make them."""
    config = test_joint_update.make_config(packed, loss=loss, kl_loss_type=kl, ppo_micro_batch_size_per_gpu=1)
    policy = PlacedModel(
        JointModel(make_lm(packed, checkpointing), ScoreHead(32, dropout=0.0), logits_dtype=logits_dtype),
        fsdp_config,
        lambda model: JointOptimizer(model, test_joint_update.OPTIM, test_joint_update.OPTIM),
    )
    frozen = JointModel(make_lm(packed, False, seed=1).bfloat16(), logits_dtype=logits_dtype).requires_grad_(False)
    reference, group = PlacedModel(frozen, fsdp_config), sequence_parallel_group(sp_size)
    reference_log_probs = PolicyLogProbs(config, reference.model, config.rollout, group)
    reference_policy = ReferencePolicy(reference.model)
    actor = DataParallelPPOActor(config, policy.model, policy.optimizer, sp_group=group, reference=reference_policy)
    batch = rows_of_rank(test_joint_update.make_batch("mixed"), sp_size)
    with policy.on_device(), reference.on_device():
        before = actor.compute_log_prob(batch, reference=reference_policy if kl == "full" else None)
    with reference.on_device():
        ref_log_prob = reference_log_probs.compute_log_prob(batch, compute_entropy=False)["old_log_probs"]
    old = before["old_log_probs"] + batch["noise"]
    with reference.on_device(), policy.on_device(with_optimizer=True):
        metrics = actor.update_policy({**batch, **before, "old_log_probs": old, "ref_log_prob": ref_log_prob})
    return {"before": before | {"ref_log_prob": ref_log_prob}, "metrics": metrics}


def critic_flow(
    fsdp_config: TrainedPlacement, packed: bool, sp_size: int, checkpointing: bool, **of_policy: Any
) -> dict[str, Any]:
    config = test_critic.make_config({"model.use_remove_padding": packed, "ppo_micro_batch_size_per_gpu": 1})
    model = test_critic.ValueModel(make_lm(packed, checkpointing).model, torch.nn.Linear(32, 1))
    placed = PlacedModel(model, fsdp_config, lambda model: Optimizers({"critic": (model, test_critic.OPTIM)}))
    critic = DataParallelPPOCritic(
        config, test_critic.SAMPLES, placed.model, placed.optimizer, sequence_parallel_group(sp_size)
    )
    batch = rows_of_rank(test_critic.make_batch(), sp_size)
    values = critic.compute_values(batch)
    return {"before": {"values": values}, "metrics": critic.update_critic(test_critic.with_old_values(batch, values))}


def run_rank(output: Path) -> None:
    """What each rank does: every variant in both dtypes from the same start; rank 0 writes what came out."""
    init_distributed()
    results: dict[str, Any] = {}
    for name, keys in VARIANTS.items():
        if RANKS[name] != dist.get_world_size():
            continue
        for dtype in DTYPES:
            torch.manual_seed(0)
            section = fsdp_section(**keys.get("fsdp_config", {}), compute_dtype=dtype)
            chosen = DEFAULTS | keys | {"fsdp_config": section}
            policy, critic = policy_flow(**chosen), critic_flow(**chosen)
            results[name, dtype] = {part: policy[part] | critic[part] for part in policy}
    if dist.get_rank() == 0:
        torch.save(results, output)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict[str, dict]]:
    """What `run_rank` found of a variant in a dtype."""
    folder = tmp_path_factory.mktemp("bfloat16")

    @cache
    def of(ranks: int) -> dict[tuple[str, str], dict[str, dict]]:
        output = folder / f"{ranks}.pt"
        command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(ranks), __file__, str(output)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return torch.load(output, weights_only=False)

    return lambda name, dtype: of(RANKS[name])[name, dtype]


CASES = [pytest.param(name, marks=pytest.mark.long if RANKS[name] > 1 else pytest.mark.slow) for name in VARIANTS]


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_float32(results: Callable, name: str) -> None:
    found, expected = (results(name, dtype)["metrics"] for dtype in DTYPES[::-1])
    losses = {metric: value for metric, value in expected.items() if metric in LOSSES}
    assert set(losses) == set(LOSSES)
    # A mean over terms of either sign, each about 1, may be near 0; it is as exact as they are. Whether old and new
    # log-probs round alike, so that their ratio is exact, depends on how a processor multiplies batches of two sizes.
    assert {metric: found[metric] for metric in losses} == pytest.approx(losses, rel=0.01, abs=2**-9)
    norms = {metric: value for metric, value in expected.items() if "grad_norm" in metric}
    assert {metric: found[metric] for metric in norms} == pytest.approx(norms, rel=0.02)
    assert found["actor/grad_norm"] != expected["actor/grad_norm"]
    assert found["actor/skipped_updates"] == 0


@pytest.mark.parametrize("name", CASES)
def test_log_probs_are_as_close_as_bfloat16_lets_them_be(results: Callable, name: str) -> None:
    """No further from float32 than those of transformers' own forward pass in bfloat16."""
    found, exact = (results(name, dtype)["before"]["old_log_probs"] for dtype in DTYPES[::-1])
    batch = test_joint_update.make_batch("mixed")[: len(exact)]
    plain = tiny_lm().bfloat16()
    with torch.no_grad():
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
        hidden = plain.model(**inputs).last_hidden_state[:, PROMPT - 1 : -1]
        log_softmax = (hidden.float() @ plain.lm_head.weight.float().T / TEMPERATURE).log_softmax(-1)
    log_probs = log_softmax.gather(-1, batch["responses"][..., None]).squeeze(-1)
    ours, theirs = ((values - exact)[batch["response_mask"]].square().mean().sqrt() for values in (found, log_probs))
    # Of the first of four ranks these are 13 tokens.
    assert 0 < ours < 1.5 * theirs


BFLOAT16_RUN = [
    *(f"actor_rollout_ref.{model}.fsdp_config.compute_dtype=bfloat16" for model in ("actor", "ref")),
    "actor_rollout_ref.model.head_dtype=float32",
    "actor_rollout_ref.rollout.dtype=bfloat16",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.save_freq=1",
]
RUNS = {
    "vllm": ["actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.rollout.check_weight_sync=true"],
    "shared": [
        "actor_rollout_ref.model.use_remove_padding=true",
        "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2",
    ],
    "hybrid, full KL": [
        "actor_rollout_ref.actor.fsdp_config.fsdp_size=1",
        "actor_rollout_ref.ref.fsdp_config.fsdp_size=1",
        "actor_rollout_ref.actor.kl_loss_type=full",
    ],
    "critic": ["algorithm.adv_estimator=gae", "critic.model.fsdp_config.compute_dtype=bfloat16"],
}


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_and_goes_on(
    name: str, small_run: list[str], tmp_path: Path, start_run: Callable[..., Any]
) -> None:
    overrides, steps = [*small_run, *BFLOAT16_RUN, *RUNS[name]], [2] if name == "vllm" else [2, 3]
    for last in steps:
        rows = start_run(tmp_path, [*overrides, f"trainer.total_training_steps={last}"]).finish().metrics()
    assert sorted(rows) == list(range(1, last + 1))
    # Engine and actor round alike but add up in another order; an engine with stale weights is off by far more.
    assert all(0 < row["rollout/log_prob_diff_mean"] < 0.02 for row in rows.values())
    assert rows[1]["actor/kl_loss"] == pytest.approx(0, abs=1e-3) and rows[last]["actor/kl_loss"] > 0.01
    assert all(row["actor/skipped_updates"] == 0 < row["actor/grad_norm"] for row in rows.values())


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
