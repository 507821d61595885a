"""Every policy loss, with off-policy correction and KL summed over the vocabulary, in the real update: against plain
transformers, on one and on two FSDP2 ranks (gloo).

This file is also the program that the ranks run (see `launch`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import chain, product
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
from verl.trainer.config.schema import ActorConfig, ActorRolloutRefConfig
from verl.trainer.ppo.policy_columns import add_policy_columns
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.placed_model import PlacedModel

TEMPERATURE, KL_COEF, CLIP = 0.8, 0.3, 0.1
CUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "by_three": {"ppo_micro_batch_size_per_gpu": 3},
    "packed_by_tokens": {"packed": True, "use_dynamic_bsz": True, "ppo_max_token_len_per_gpu": 20},
    "sequence_parallel": {"packed": True, "sp_size": 2},
}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {"tis_imp_ratio_cap": 1.1},
    "gspo": {"loss": "gspo", "clip_ratio": 0.01, "rollout_is": "sequence", "rollout_is_threshold": 1.2},
    "cispo": {"loss": "cispo", "rollout_is": "token", "rollout_is_mode": "mask", "rollout_is_threshold": 1.3},
    "dr_grpo": {
        "loss": "dr_grpo",
        "rollout_is": "sequence",
        "rollout_is_mode": "mask",
        "rollout_is_threshold": 1.2,
        "rollout_is_threshold_lower": 0.8,
        "rollout_rs_geo_threshold": 1.1,
    },
}
OTHERS = [algorithm for algorithm in ALGORITHMS if algorithm != "ppo"]
CASES = {
    1: [*product(["ppo"], ["padded", "by_three"]), *product(OTHERS, ["by_three", "packed_by_tokens"])],
    2: [*product(["ppo"], CUTS), *product(OTHERS, ["packed_by_tokens", "sequence_parallel"])],
}
"""What each number of ranks runs; in `sequence_parallel` two ranks compute the same rows."""


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
            "actor.clip_ratio": CLIP,
            "rollout.n": 4,
            "rollout.response_length": RESPONSE,
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
        "responses": rows["input_ids"][:, PROMPT:],
        "graded": graded,
        "advantages": torch.randn(ROWS, 1, generator=generator) * rows["response_mask"],
        "noise": 0.1 * torch.randn(ROWS, RESPONSE, generator=generator),
        "rollout_noise": 0.3 * torch.randn(ROWS, RESPONSE, generator=generator),
    }


def with_old_policy(batch: dict[str, Tensor], log_probs: Tensor, actor: ActorConfig) -> dict[str, Tensor]:
    """Pretend that the policy has moved since the log-probs were computed, and that the engine computes others."""
    old = log_probs + batch["noise"]
    columns = batch | {"old_log_probs": old, "rollout_log_probs": old + batch["rollout_noise"]}
    add_policy_columns(columns, actor, end_token_ids=[])
    return columns


def run_rank(folder: Path) -> None:
    """What each rank does: every variant from the same start; rank 0 writes what came out."""
    init_distributed()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results = {}
    for algorithm, cut in CASES[world_size]:
        changes = CUTS[cut] | ALGORITHMS[algorithm]
        config = make_config(**changes)
        sp_size, packed = changes.get("sp_size", 1), config.model.use_remove_padding
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
        metrics = actor.update_policy(with_old_policy(batch, before["old_log_probs"], config.actor))
        frozen = all(p.grad is None for p in reference.model.parameters())
        results[algorithm, cut] = {"ref_kl": before["ref_kl"], "metrics": metrics, "frozen": frozen}
        with pytest.raises(KeyError, match="importance_weights"):
            actor.update_policy(batch | before)
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


def plain_token_losses(algorithm: str, log_ratios: Tensor, log_probs: Tensor, advantages: Tensor) -> list[Tensor]:
    """Of one response, before they are weighed; all [tokens]. GSPO's one term stands for each of its tokens."""
    clip = ALGORITHMS[algorithm].get("clip_ratio", CLIP)
    ratios = log_ratios.exp()
    if algorithm == "cispo":
        return list(-ratios.detach().clamp(1 - clip, 1 + clip) * advantages * log_probs)
    if algorithm == "gspo":
        ratios = log_ratios.mean().exp().expand(len(log_ratios))
    return [-min(a * ratio, a * ratio.clamp(1 - clip, 1 + clip)) for a, ratio in zip(advantages, ratios)]


def plain_weights(algorithm: str, ratios: Tensor) -> list[float]:
    """Of one response's tokens, by their ratios of trainer to engine [tokens]."""
    match algorithm:
        case "ppo":
            return [min(1.1, ratio) for ratio in ratios.tolist()]
        case "gspo":
            return [min(1.2, float(ratios.prod()))] * len(ratios)
        case "cispo":
            return [ratio * (1 / 1.3 <= ratio <= 1.3) for ratio in ratios.tolist()]
    whole, mean = float(ratios.prod()), float(ratios.prod()) ** (1 / len(ratios))
    return [whole * (0.8 <= whole <= 1.2)] * len(ratios) if 1 / 1.1 <= mean <= 1.1 else []


def plain_mean(algorithm: str, of_responses: list[list[Tensor]]) -> Tensor:
    """Of what the tokens of each response that counts have."""
    match algorithm:
        case "gspo":
            return sum(sum(values) / len(values) for values in of_responses) / len(of_responses)
        case "dr_grpo":
            return sum(sum(values) for values in of_responses) / RESPONSE / len(of_responses)
    return sum(sum(values) for values in of_responses) / sum(map(len, of_responses))


def plain_update(algorithm: str, folder: Path) -> tuple[dict[str, float], Tensor]:
    """Metrics of the update, and the KL [B, R] before it."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("policy", "reference"))
    batch, pg_losses, kls = make_batch(), [], []
    column = torch.zeros(ROWS, RESPONSE)
    for row in range(ROWS):
        log_softmax = plain_log_softmax(policy, batch, row)
        kl = kl_div(plain_log_softmax(reference, batch, row).detach(), log_softmax, reduction="none", log_target=True)
        kl, tokens = kl.sum(-1), len(kl)
        column[row, :tokens] = kl.detach()
        noise, rollout_noise, advantages = (batch[n][row, :tokens] for n in ("noise", "rollout_noise", "advantages"))
        weights = plain_weights(algorithm, (-rollout_noise).exp())
        if not batch["graded"][row] or not weights:
            continue
        log_probs = log_softmax.gather(-1, batch["responses"][row, :tokens, None]).squeeze(-1)
        losses = plain_token_losses(algorithm, log_probs - log_probs.detach() - noise, log_probs, advantages)
        pg_losses.append([weight * loss for weight, loss in zip(weights, losses)])
        kls.append(list(kl))
    parts = {"actor/pg_loss": plain_mean(algorithm, pg_losses), "actor/kl_loss": plain_mean(algorithm, kls)}
    parts["actor/loss"] = parts["actor/pg_loss"] + KL_COEF * parts["actor/kl_loss"]
    parts["actor/loss"].backward()
    parts["actor/grad_norm"] = torch.nn.utils.get_total_norm([p.grad for p in policy.parameters()])
    return {name: value.item() for name, value in parts.items()}, column


def test_the_cases_are_what_they_say() -> None:
    batch = make_batch()
    ratios = [(-noise[mask]).exp() for noise, mask in zip(batch["rollout_noise"], batch["response_mask"])]
    for algorithm, bound in {"ppo": 1.1, "gspo": 1.2, "cispo": 0.0, "dr_grpo": 0.0}.items():
        of_responses = [plain_weights(algorithm, of_tokens) for of_tokens in ratios]
        assert sum(not weights for weights in of_responses) == (3 if algorithm == "dr_grpo" else 0)
        weights = set(chain(*of_responses))
        assert bound in weights and len(weights) > 2, algorithm


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_the_update_is_the_plain_one(ranks: int, tmp_path: Path) -> None:
    results = launch(ranks, tmp_path)
    for algorithm in ALGORITHMS:
        expected, ref_kl = plain_update(algorithm, tmp_path)
        for cut in [cut for name, cut in CASES[ranks] if name == algorithm]:
            result = results[algorithm, cut]
            found = {name: result["metrics"][name] for name in expected}
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), (algorithm, cut)
            assert result["metrics"]["actor/pg_clipfrac"] > 0, algorithm
            rows = result["ref_kl"]
            torch.testing.assert_close(rows, ref_kl[: len(rows)], rtol=1e-4, atol=1e-5)
            assert result["frozen"]


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
