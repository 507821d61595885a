"""Packed sequences and sequence parallelism on two real ranks on Ray: they change the cost, not the result."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import ray
import torch
from tiny import ppo_defaults

from verl import DataProto
from verl.single_controller import RayResourcePool, each
from verl.trainer.config.machine import resolve_auto
from verl.trainer.config.schema import ActorRolloutRefConfig
from verl.workers.fsdp_workers import ActorRolloutRefWorker, PolicyWorkers, group_sizes
from xbai.sprm.head import SPRM_CONFIG_FILE

pytestmark = pytest.mark.slow

ROWS, PROMPT, RESPONSE, TOTAL_STEPS = 8, 6, 24, 10
WAYS = {
    "padded": {},
    "packed": {"model.use_remove_padding": True, "actor.use_dynamic_bsz": True, "actor.ppo_max_token_len_per_gpu": 40},
    "shared": {"model.use_remove_padding": True, "actor.ulysses_sequence_parallel_size": 2},
    "shared_policy": {
        "model.use_remove_padding": True,
        "actor.ulysses_sequence_parallel_size": 2,
        "ref.ulysses_sequence_parallel_size": 1,
    },
    "compared": {"score.loss": "both", "score.aggregation": "soft_min"},
    "compared_shared": {
        "score.loss": "both",
        "score.aggregation": "soft_min",
        "model.use_remove_padding": True,
        "actor.ulysses_sequence_parallel_size": 2,
    },
}
REFERENCES = {"compared_shared": "compared"}
"""What a way is compared with, where that is not the padded one."""


def make_config(model: Path, changes: dict[str, object]) -> ActorRolloutRefConfig:
    """The trainer's own defaults, made small."""
    config = ppo_defaults(
        "trainer.device=cpu",
        f"data.max_prompt_length={PROMPT}",
        f"data.max_response_length={RESPONSE}",
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.rollout={name: hf, n: 2, dtype: float32, temperature: 0.7}",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=3",
        "actor_rollout_ref.actor={ppo_mini_batch_size: 4, ppo_micro_batch_size_per_gpu: 3}",
        "actor_rollout_ref.actor={entropy_coeff: 0.01, kl_loss_coef: 0.1}",
        "actor_rollout_ref.score={agreement_weighting: false, backbone_grad_scale: 0.1}",
        *(f"actor_rollout_ref.{key}={value}" for key, value in changes.items()),
    )
    config, _ = resolve_auto(config, gpu_bytes=None)
    return config.actor_rollout_ref


def make_batch(step_id: int) -> DataProto:
    """Rows of very different lengths, every third token of a response the end of a step."""
    torch.manual_seed(0)
    prompts, responses = torch.tensor([[1], [6], [3], [2], [5], [1], [4], [6]]), torch.arange(1, 25, 3)[:, None]
    columns = torch.arange(PROMPT + RESPONSE)
    attended = (columns >= PROMPT - prompts) & (columns < PROMPT + responses)
    ids = torch.where((columns > PROMPT) & (columns % 3 == 0), step_id, torch.randint(5, 90, attended.shape)) * attended
    correct = torch.tensor([1.0, 0.0]).repeat(ROWS // 2)
    return DataProto.from_dict(
        {
            "input_ids": ids,
            "attention_mask": attended.long(),
            "position_ids": (attended.cumsum(1) - 1).clamp(min=0),
            "prompts": ids[:, :PROMPT],
            "responses": ids[:, PROMPT:],
            "response_mask": attended[:, PROMPT:].long(),
            "correct": correct,
            "graded": torch.ones(ROWS, dtype=torch.bool),
            "advantages": (2 * correct - 1)[:, None] * attended[:, PROMPT:],
        }
    )


class StartingAnew(ActorRolloutRefWorker):
    """Processes take far longer to start than to compute what is compared here."""

    def configure(self, config: ActorRolloutRefConfig) -> None:
        self.config = config
        self.init_model()


class WorkersStartingAnew(PolicyWorkers):
    """Their group."""

    configure = each(StartingAnew.configure)


def train(
    group: WorkersStartingAnew, config: ActorRolloutRefConfig, batch: DataProto
) -> tuple[DataProto, dict[str, float]]:
    """Log-probs under policy and reference, one update, and log-probs after it."""
    group.configure(config)
    group.group_sizes = group_sizes(config)
    for compute in (group.compute_log_prob, group.compute_ref_log_prob):
        batch.batch.update(compute(batch).batch)
    objective = config.score.objective
    columns = (batch.batch[name] for name in ("old_step_logits", "step_feature_mask", "correct", "graded"))
    # The rows of two prompts, four of each.
    batch.batch["rival_scores"] = objective.rivals(*columns, [row // 4 for row in range(ROWS)])
    metrics = group.update_actor(batch).meta_info["metrics"]
    batch.batch["log_probs_after"] = group.compute_log_prob(batch).batch["old_log_probs"]
    return batch, metrics


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without dropout in the score head: whoever holds a step computes the same for it."""
    folder = tmp_path_factory.mktemp("model") / "without_dropout"
    shutil.copytree(tiny_model_dir, folder)
    settings = json.loads((folder / SPRM_CONFIG_FILE).read_text(encoding="utf-8"))
    (folder / SPRM_CONFIG_FILE).write_text(json.dumps({**settings, "dropout": 0.0}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def results(model: Path, tiny_tokenizer) -> Iterator[dict[str, tuple[DataProto, dict[str, float]]]]:
    step_id = tiny_tokenizer.convert_tokens_to_ids(".\n\n")
    # Ray would have the workers import this module by a name that only pytest knows.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    configs = {way: make_config(model, keys) for way, keys in WAYS.items()}
    pool = RayResourcePool([2], use_gpu=False, cpus_per_process=0.5)
    init = partial(StartingAnew, configs["padded"], "actor_rollout_ref", TOTAL_STEPS)
    group = WorkersStartingAnew(pool, init, name="actor")
    yield {way: train(group, config, make_batch(step_id)) for way, config in configs.items()}
    group.shutdown()
    pool.release()
    ray.shutdown()


@pytest.mark.parametrize("way", ["packed", "shared", "shared_policy", "compared_shared"])
def test_the_result_is_that_of_padded_rows(way: str, results: dict) -> None:
    (batch, metrics), (expected, expected_metrics) = results[way], results[REFERENCES.get(way, "padded")]
    assert int(expected.batch["step_feature_mask"].sum()) > 10
    for name in ("old_log_probs", "entropys", "old_step_logits", "ref_log_prob"):
        torch.testing.assert_close(batch.batch[name], expected.batch[name], rtol=1e-5, atol=1e-5)
    compared = [name for name in expected_metrics if name.startswith(("actor/", "score/"))]
    assert {"actor/loss", "actor/grad_norm", "score/grad_norm", "score/loss", "actor/kl_loss"} <= set(compared)
    assert {n: metrics[n] for n in compared} == pytest.approx(
        {n: expected_metrics[n] for n in compared}, rel=1e-4, abs=1e-6
    )
    # Adam's first step is nearly the sign of the gradient, and rounding has a say in that of the smallest ones.
    torch.testing.assert_close(batch.batch["log_probs_after"], expected.batch["log_probs_after"], rtol=0, atol=1e-3)


def test_comparing_responses_is_another_loss(results: dict) -> None:
    (_, metrics), (_, plain) = results["compared"], results["padded"]
    # Of four rows each, two are right; one is too short for a step.
    assert metrics["score/counted_pairs"] == 2 * (2 * 2 + 1 * 2)
    assert metrics["score/loss"] > plain["score/loss"] + 0.1


def test_micro_batches_are_filled_by_real_tokens(results: dict) -> None:
    assert results["padded"][1]["perf/micro_batches"] == 2
    assert results["packed"][1]["perf/micro_batches"] == 3, "the longer half of the rows has 86 tokens, for 40 at once"
    assert results["shared"][1]["perf/micro_batches"] == 3, "all rows on both ranks, three at a time"
