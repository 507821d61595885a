"""KL summed over the vocabulary and truncated importance weights in the real update, against plain transformers, on one
and on two FSDP2 ranks (gloo).

This file is also the program that the ranks run (see `launch`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import PROMPT, RESPONSE, ROWS, adam, fsdp_section, padded_rows, policy_section, tiny_lm
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from verl.models.fsdp import init_distributed
from verl.models.loading import build_joint_model
from verl.models.reference import ReferencePolicy
from verl.models.ulysses import sequence_parallel_group
from verl.optim.optimizers import JointOptimizer
from verl.trainer.config.schema import ActorRolloutRefConfig
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.placed_model import PlacedModel

TEMPERATURE, CAP, KL_COEF = 0.8, 1.1, 0.3
VARIANTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "by_three": {"ppo_micro_batch_size_per_gpu": 3},
    "packed_by_tokens": {"packed": True, "use_dynamic_bsz": True, "ppo_max_token_len_per_gpu": 20},
    "sequence_parallel": {"packed": True, "sp_size": 2},
}


def make_config(packed: bool = False, sp_size: int = 1, **actor: object) -> ActorRolloutRefConfig:
    """An `actor_rollout_ref` section without a score head."""
    return policy_section(
        {
            "use_score": False,
            "model.use_remove_padding": packed,
            "actor.ppo_mini_batch_size": 2,
            "actor.ppo_micro_batch_size_per_gpu": 8,
            "actor.use_kl_loss": True,
            "actor.kl_loss_coef": KL_COEF,
            "actor.kl_loss_type": "full",
            "actor.tis_imp_ratio_cap": CAP,
            "rollout.n": 4,
            "rollout.temperature": TEMPERATURE,
            "rollout.log_prob_micro_batch_size_per_gpu": 3,
            **{f"actor.{key}": value for key, value in actor.items()},
        }
    )


def make_folder(folder: Path, seed: int, tied: bool) -> Path:
    tiny_lm(seed, tie_word_embeddings=tied).save_pretrained(folder)
    return folder


def make_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = padded_rows(generator)
    graded = torch.ones(ROWS, dtype=torch.bool)
    graded[3] = False
    return {
        **rows,
        "graded": graded,
        "advantages": torch.randn(ROWS, 1, generator=generator) * rows["response_mask"],
        "noise": 0.1 * torch.randn(ROWS, RESPONSE, generator=generator),
        "rollout_noise": 0.3 * torch.randn(ROWS, RESPONSE, generator=generator),
    }


def with_old_policy(batch: dict[str, Tensor], log_probs: Tensor) -> dict[str, Tensor]:
    """Pretend that the policy has moved since the log-probs were computed, and that the engine computes others."""
    old = log_probs + batch["noise"]
    return batch | {"old_log_probs": old, "rollout_log_probs": old + batch["rollout_noise"]}


def run_rank(folder: Path) -> None:
    """What each rank does: every variant from the same start; rank 0 writes what came out."""
    init_distributed()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results = {}
    for variant, changes in VARIANTS.items():
        config = make_config(**changes)
        sp_size, packed = changes.get("sp_size", 1), config.model.use_remove_padding
        if sp_size > world_size:
            continue
        frozen = build_joint_model(folder / "reference", packed=packed).requires_grad_(False)
        reference = PlacedModel(frozen, fsdp_section())
        policy = PlacedModel(
            build_joint_model(folder / "policy", packed=packed),
            fsdp_section(),
            lambda model: JointOptimizer(model, adam()),
        )
        group = sequence_parallel_group(sp_size)
        reference_policy = ReferencePolicy(reference.model)
        actor = DataParallelPPOActor(config, policy.model, policy.optimizer, sp_group=group, reference=reference_policy)
        size, share = ROWS * sp_size // world_size, rank // sp_size
        batch = {name: column[share * size :][:size] for name, column in make_batch().items()}
        before = actor.compute_log_prob(batch, reference=reference_policy)
        metrics = actor.update_policy(with_old_policy(batch, before["old_log_probs"]))
        frozen = all(p.grad is None for p in reference.model.parameters())
        results[variant] = {"ref_kl": before["ref_kl"], "metrics": metrics, "frozen": frozen}
        with pytest.raises(KeyError, match="rollout_log_probs"):
            actor.update_policy(batch)
    if rank == 0:
        torch.save(results, folder / f"{world_size}.pt")
    dist.destroy_process_group()


def launch(ranks: int, folder: Path) -> dict[str, dict]:
    """Run this file on `ranks` processes and read what rank 0 wrote."""
    make_folder(folder / "policy", seed=0, tied=False)
    make_folder(folder / "reference", seed=1, tied=ranks == 2)
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, __file__, str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / f"{ranks}.pt", weights_only=False)


def plain_log_softmax(model: Qwen3ForCausalLM, batch: dict[str, Tensor], row: int) -> Tensor:
    """[tokens, vocabulary] before each response token of one row, computed alone and without padding."""
    kept = batch["attention_mask"][row].bool()
    logits = model(batch["input_ids"][row][kept][None]).logits[0] / TEMPERATURE
    return logits[-int(batch["response_mask"][row].sum()) - 1 : -1].log_softmax(-1)


def plain_update(folder: Path) -> tuple[dict[str, float], Tensor]:
    """Metrics of the update, and the KL [B, R] before it."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("policy", "reference"))
    batch, pg_losses, kls = make_batch(), [], []
    column = torch.zeros(ROWS, RESPONSE)
    for row in range(ROWS):
        log_softmax = plain_log_softmax(policy, batch, row)
        kl = kl_div(plain_log_softmax(reference, batch, row).detach(), log_softmax, reduction="none", log_target=True)
        column[row, : len(kl)] = kl.sum(-1).detach()
        if not batch["graded"][row]:
            continue
        kls += kl.sum(-1).unbind()
        for t, label in enumerate(batch["input_ids"][row, PROMPT:][: len(kl)]):
            log_prob, advantage = log_softmax[t, label], batch["advantages"][row, t]
            ratio = (log_prob - log_prob.detach() - batch["noise"][row, t]).exp()
            loss = -min(advantage * ratio, advantage * ratio.clamp(0.8, 1.2))
            pg_losses.append(loss * min(CAP, (-batch["rollout_noise"][row, t]).exp().item()))
    parts = {"actor/pg_loss": sum(pg_losses) / len(kls), "actor/kl_loss": sum(kls) / len(kls)}
    parts["actor/loss"] = parts["actor/pg_loss"] + KL_COEF * parts["actor/kl_loss"]
    parts["actor/loss"].backward()
    parts["actor/grad_norm"] = torch.nn.utils.get_total_norm([p.grad for p in policy.parameters()])
    return {name: value.item() for name, value in parts.items()}, column


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_the_update_is_the_plain_one(ranks: int, tmp_path: Path) -> None:
    results = launch(ranks, tmp_path)
    expected, ref_kl = plain_update(tmp_path)
    assert results.keys() >= VARIANTS.keys() - ({"sequence_parallel"} if ranks == 1 else set())
    for variant, result in results.items():
        found = {name: result["metrics"][name] for name in expected}
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), variant
        rows = result["ref_kl"]
        torch.testing.assert_close(rows, ref_kl[: len(rows)], rtol=1e-4, atol=1e-5)
        assert result["frozen"]


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
