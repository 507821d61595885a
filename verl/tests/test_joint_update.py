"""The joint update against a plain, unsharded reference, on one, two and four real FSDP2 ranks (gloo).

This file is also the program that the ranks run (see `launch`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from tiny import PROMPT, RESPONSE, ROWS, adam, padded_rows, policy_section, tiny_lm
from torch import Tensor
from torch.nn.functional import pad

from verl.models.fsdp import create_mesh, init_distributed, named_full_tensors, shard_model
from verl.models.joint_model import JointModel
from verl.models.loading import attention_for
from verl.models.packing import packed_layout
from verl.models.ulysses import sequence_parallel_group
from verl.optim.optimizers import JointOptimizer
from verl.trainer.config.schema import ActorRolloutRefConfig
from verl.workers.actor.dp_actor import DataParallelPPOActor
from xbai.sprm import ScoreHead

SCENARIOS = ("mixed", "rank_1_without_steps", "only_wrong", "ungraded", "nothing_graded", "identical")
SPLITS = {
    "whole": {"ppo_micro_batch_size_per_gpu": 8},
    "by_three": {"ppo_micro_batch_size_per_gpu": 3},
    "by_tokens": {"use_dynamic_bsz": True, "ppo_max_token_len_per_gpu": 20},
    "packed": {"packed": True, "ppo_micro_batch_size_per_gpu": 3},
    "packed_by_tokens": {"packed": True, "use_dynamic_bsz": True, "ppo_max_token_len_per_gpu": 16},
    "shared": {"packed": True, "sp": 2, "ppo_micro_batch_size_per_gpu": 8},
    "shared_by_tokens": {"packed": True, "sp": 2, "use_dynamic_bsz": True, "ppo_max_token_len_per_gpu": 9},
}
CASES = {
    1: [(scenario, split) for scenario in SCENARIOS for split in SPLITS if "shared" not in split],
    2: [(scenario, split) for scenario in SCENARIOS for split in SPLITS],
    4: [(scenario, "shared_by_tokens") for scenario in ("mixed", "rank_1_without_steps", "identical")],
}
"""What each number of ranks runs; in the shared splits two ranks compute the same rows."""
OPTIM = adam()


def make_config(packed: bool = False, **actor: object) -> ActorRolloutRefConfig:
    """An `actor_rollout_ref` section in which every term of the loss acts."""
    return policy_section(
        {
            "model.use_remove_padding": packed,
            "actor.ppo_mini_batch_size": 2,
            "actor.ppo_micro_batch_size_per_gpu": 8,
            "actor.clip_ratio_high": 0.25,
            "actor.clip_ratio_c": 1.5,
            "actor.entropy_coeff": 0.01,
            "actor.use_kl_loss": True,
            "actor.kl_loss_coef": 0.1,
            "rollout.n": 4,
            "rollout.temperature": 0.8,
            "rollout.log_prob_micro_batch_size_per_gpu": 3,
            "score.backbone_grad_scale": 0.3,
            **{f"actor.{key}": value for key, value in actor.items()},
        }
    )


def make_model(packed: bool = False) -> JointModel:
    """A random model without dropout: whoever holds a row computes the same for it."""
    lm = tiny_lm()
    lm.set_attn_implementation(attention_for(torch.float32, packed))
    return JointModel(lm, ScoreHead(32, dropout=0.0))


def make_batch(scenario: str) -> TensorDict:
    """The global batch, without what the actor itself computes first."""
    generator = torch.Generator().manual_seed(1)
    rows = padded_rows(generator)
    if scenario == "identical":
        rows = {name: column[[0, 0, 2, 5, 5, 5, 0, 7]] for name, column in rows.items()}
    features = torch.rand(ROWS, PROMPT + RESPONSE, generator=generator) < 0.5
    features &= pad(rows["response_mask"], (PROMPT, 0))
    features[ROWS // 2, PROMPT : PROMPT + 2] = True
    correct, graded = torch.tensor([1.0, 0, 1, 0, 0, 1, 1, 0]), torch.ones(ROWS, dtype=torch.bool)
    if scenario == "rank_1_without_steps":
        features[ROWS // 2 :] = False
    if scenario == "only_wrong":
        correct = torch.zeros(ROWS)
    if scenario == "ungraded":
        graded[[1, 4, 5]] = False
    if scenario == "nothing_graded":
        graded[:] = False
    return TensorDict(
        {
            **rows,
            "responses": rows["input_ids"][:, PROMPT:],
            "step_feature_mask": features,
            "correct": correct,
            "graded": graded,
            "advantages": torch.randn(ROWS, 1, generator=generator) * rows["response_mask"],
            "noise": 0.3 * torch.randn(ROWS, RESPONSE, generator=generator),
            "ref_noise": 0.3 * torch.randn(ROWS, RESPONSE, generator=generator),
        },
        batch_size=[ROWS],
    )


def with_old_policy(batch: TensorDict, before: TensorDict) -> TensorDict:
    """Pretend that old and reference policy were others, so that ratios differ from 1 and clipping acts."""
    old = before["old_log_probs"] + batch["noise"]
    return batch.update({**before, "old_log_probs": old, "ref_log_prob": before["old_log_probs"] + batch["ref_noise"]})


def run_rank(output: Path) -> None:
    """What each rank does: every scenario and split from the same start; rank 0 writes what came out."""
    init_distributed()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results = {}
    groups = {size: sequence_parallel_group(size) for size in (1, 2) if size <= world_size}
    for scenario, split in CASES[world_size]:
        keys = dict(SPLITS[split])
        sp_size = keys.pop("sp", 1)
        config = make_config(**keys)
        model = shard_model(make_model(config.model.use_remove_padding), create_mesh())
        optimizer = JointOptimizer(model, OPTIM, OPTIM)
        actor = DataParallelPPOActor(config, model, optimizer, sp_group=groups[sp_size])
        batch = make_batch(scenario).chunk(world_size // sp_size)[rank // sp_size].contiguous()
        before = actor.compute_log_prob(batch)
        metrics = actor.update_policy(with_old_policy(batch, before))
        weights = {name: tensor.clone() for name, tensor in named_full_tensors(model)}
        results[scenario, split] = {"before": before, "metrics": metrics, "weights": weights}
    if rank == 0:
        torch.save(results, output)
    dist.destroy_process_group()


def launch(ranks: int, folder: Path) -> dict:
    """Run this file on `ranks` processes and read what rank 0 wrote."""
    output = folder / f"{ranks}.pt"
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, __file__, str(output)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(output, weights_only=False)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return launch(1, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return launch(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return launch(4, tmp_path_factory.mktemp("four"))


def plain_forward(model: JointModel, batch: TensorDict, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs and entropies [B, R] and step logits [B, T] by transformers' own forward pass."""
    keys = ("input_ids", "attention_mask", "position_ids")
    out = model.lm(**{key: batch[key] for key in keys}, output_hidden_states=True)
    log_softmax = (out.logits[:, PROMPT - 1 : -1] / 0.8).log_softmax(-1)
    log_probs = log_softmax.gather(-1, batch["responses"][..., None]).squeeze(-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    hidden = out.hidden_states[-2]
    return log_probs, entropy, model.score_head(hidden * scale + hidden.detach() * (1 - scale))


def plain_loss(model: JointModel, batch: TensorDict) -> dict[str, Tensor]:
    """The loss of the issue and of PPO, token by token and step by step."""
    log_probs, entropy, step_logits = plain_forward(model, batch, scale=0.3)
    zero = step_logits.sum() * 0
    pg, kl, entropies, positive, negative = [], [], [], [], []
    for row in range(ROWS):
        if not batch["graded"][row]:
            continue
        for t in range(int(batch["response_mask"][row].sum())):
            advantage, ratio = batch["advantages"][row, t], (log_probs - batch["old_log_probs"])[row, t].exp()
            value = -min(advantage * ratio, advantage * ratio.clamp(0.8, 1.25))
            pg.append(min(value, -advantage * 1.5) if advantage < 0 else value)
            difference = batch["ref_log_prob"][row, t] - log_probs[row, t]
            kl.append(difference.exp() - 1 - difference)
            entropies.append(entropy[row, t])
        for t in batch["step_feature_mask"][row].nonzero().flatten():
            right, agrees = bool(batch["correct"][row]), bool(batch["old_step_logits"][row, t] > 0)
            if right == agrees:
                score = step_logits[row, t].sigmoid()
                (positive if right else negative).append(-score.log() if right else -(1 - score).log())
    counted = len(positive) + len(negative)
    weights = (1.5 * len(negative) / counted, len(positive) / counted) if counted else (0.0, 0.0)
    total_weight = weights[0] * len(positive) + weights[1] * len(negative)
    weighted = weights[0] * sum(positive, zero) + weights[1] * sum(negative, zero)
    parts = {
        "actor/pg_loss": sum(pg, zero) / max(len(pg), 1),
        "actor/kl_loss": sum(kl, zero) / max(len(pg), 1),
        "actor/entropy_loss": sum(entropies, zero) / max(len(pg), 1),
        "score/loss": weighted / total_weight if total_weight else weighted,
    }
    loss = parts["actor/pg_loss"] - 0.01 * parts["actor/entropy_loss"] + 0.1 * parts["actor/kl_loss"]
    return parts | {"actor/loss": loss + parts["score/loss"]}


def plain_update(scenario: str) -> dict[str, float]:
    model = make_model()
    batch = make_batch(scenario)
    log_probs, _, step_logits = plain_forward(model, batch, scale=1.0)
    before = {"old_log_probs": log_probs.detach(), "old_step_logits": step_logits.detach()}
    parts = plain_loss(model, with_old_policy(batch, before))
    parts["actor/loss"].backward()
    norms = {
        "actor/grad_norm": torch.nn.utils.get_total_norm([p.grad for p in model.lm.parameters() if p.grad is not None]),
        "score/grad_norm": torch.nn.utils.get_total_norm([p.grad for p in model.score_head.parameters()]),
    }
    return {name: value.item() for name, value in {**parts, **norms}.items()}


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_any_split_over_micro_batches_and_ranks_is_the_plain_update(
    scenario: str, one_rank: dict, two_ranks: dict, four_ranks: dict
) -> None:
    expected = plain_update(scenario)
    for ranks, results in {1: one_rank, 2: two_ranks, 4: four_ranks}.items():
        for split in [split for name, split in CASES[ranks] if name == scenario]:
            metrics = results[scenario, split]["metrics"]
            got = {name: metrics[name] for name in expected}
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-6), (ranks, split)
            assert metrics["actor/skipped_updates"] == 0


@pytest.mark.slow
def test_the_cases_are_what_they_say(one_rank: dict) -> None:
    def metrics(scenario: str) -> dict[str, float]:
        return one_rank[scenario, "whole"]["metrics"]

    assert metrics("mixed")["score/counted_right"] > 0
    assert metrics("mixed")["score/counted_wrong"] > 0
    assert metrics("mixed")["actor/pg_clipfrac"] > 0
    assert metrics("mixed")["actor/pg_clipfrac_lower"] > 0
    assert metrics("only_wrong")["score/counted_right"] == 0
    assert metrics("nothing_graded")["actor/grad_norm"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("split", ["by_three", "packed_by_tokens", "shared_by_tokens"])
def test_weights_after_the_update_agree(scenario: str, split: str, one_rank: dict, two_ranks: dict) -> None:
    one, two = one_rank[scenario, "whole"]["weights"], two_ranks[scenario, split]["weights"]
    assert one.keys() == two.keys() >= {"lm_head.weight", "model.embed_tokens.weight", "score_head.3.bias"}
    # Adam's first step is nearly the sign of the gradient, so elements whose gradient is rounding noise may differ by
    # up to two learning rates.
    for name, tensor in one.items():
        close = torch.isclose(tensor, two[name], atol=1e-5)
        assert close.float().mean() > 0.99, name
        assert (tensor - two[name]).abs().max() <= 2.1 * OPTIM.lr, name


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "split"), [("one_rank", "whole"), ("one_rank", "packed"), ("two_ranks", "shared")])
def test_log_probs_entropies_and_step_logits_are_those_of_the_plain_model(
    ranks: str, split: str, request: pytest.FixtureRequest
) -> None:
    batch, before = make_batch("mixed"), request.getfixturevalue(ranks)["mixed", split]["before"]
    with torch.no_grad():
        log_probs, entropy, step_logits = plain_forward(make_model(), batch, scale=1.0)
    mask, features = batch["response_mask"], batch["step_feature_mask"]
    torch.testing.assert_close(before["old_log_probs"], log_probs.masked_fill(~mask, 0.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(before["entropys"], entropy.masked_fill(~mask, 0.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(before["old_step_logits"], step_logits * features, rtol=1e-5, atol=1e-5)


def test_there_are_steps_and_their_tokens_on_the_seams() -> None:
    """What the ranks of the shared splits have between them, where all rows are one micro-batch."""
    batch = make_batch("mixed")
    layout = packed_layout(batch)
    seam = -(-int(batch["attention_mask"].sum()) // 2)
    for slot in (seam - 1, seam):
        assert slot in layout.predictors
        assert slot in layout.features


@pytest.mark.slow
def test_micro_batches_are_counted_and_even(one_rank: dict, two_ranks: dict) -> None:
    for results, count in ((one_rank, 6), (two_ranks, 3)):
        metrics = results["mixed", "packed_by_tokens"]["metrics"]
        assert metrics["perf/micro_batches"] == count
        assert 1 <= metrics["perf/tokens_per_micro_batch_max_over_mean"] < 1.2
    assert one_rank["mixed", "by_three"]["metrics"]["perf/micro_batches"] == 3
    assert one_rank["identical", "by_three"]["metrics"]["perf/micro_batches"] == 2, "four rows differ"


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
