"""One vLLM engine over two ranks of the trainer: the tokens of one engine a rank, and the actor's log-probs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import ray
import torch
from tiny import ppo_defaults
from transformers import Qwen3Config, Qwen3ForCausalLM

from verl import DataProto
from verl.single_controller import RayResourcePool
from verl.trainer.config.machine import resolve_auto
from verl.trainer.config.schema import ActorRolloutRefConfig
from verl.workers.fsdp_workers import ActorRolloutRefWorker, PolicyWorkers, group_sizes

pytest.importorskip("vllm")
PROMPTS, SAMPLES, PROMPT_LENGTH, RESPONSE_LENGTH, TOTAL_STEPS = 3, 2, 6, 24, 10


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def make_model(tiny_tokenizer, tmp_path: Path) -> Callable[..., Path]:
    """`make_model(key_value_heads, tied) -> folder`: a random Qwen3 whose other sizes two ranks can divide."""

    def make(key_value_heads: int, tied: bool) -> Path:
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=len(tiny_tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=key_value_heads,
            head_dim=32,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            initializer_range=0.15,
            eos_token_id=tiny_tokenizer.eos_token_id,
            pad_token_id=tiny_tokenizer.pad_token_id,
        )
        Qwen3ForCausalLM(config).save_pretrained(tmp_path)
        tiny_tokenizer.save_pretrained(tmp_path)
        return tmp_path

    return make


def make_config(model: Path, ranks: int) -> ActorRolloutRefConfig:
    config = ppo_defaults(
        "trainer.device=cpu",
        f"data.max_prompt_length={PROMPT_LENGTH}",
        f"data.max_response_length={RESPONSE_LENGTH}",
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.use_score=false",
        f"actor_rollout_ref.rollout.n={SAMPLES}",
        f"actor_rollout_ref.rollout.tensor_model_parallel_size={ranks}",
        "actor_rollout_ref.rollout.check_weight_sync=true",
        "actor_rollout_ref.rollout={dtype: float32, temperature: 0.7, max_num_seqs: 16, top_p: 0.9}",
        "actor_rollout_ref.actor={ppo_mini_batch_size: 2, ppo_micro_batch_size_per_gpu: 2, optim: {lr: 0.01}}",
        "actor_rollout_ref.actor.use_kl_loss=false",
    )
    config, _ = resolve_auto(config, gpu_bytes=None)
    return config.actor_rollout_ref


def make_prompts(vocabulary: int) -> DataProto:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(PROMPT_LENGTH) >= torch.tensor([0, 2, 4])[:, None]).long()
    ids = torch.randint(0, vocabulary, (PROMPTS, PROMPT_LENGTH), generator=generator) * mask
    return DataProto.from_dict({"input_ids": ids, "attention_mask": mask, "seed": [7, 8, 9]})


def train_and_generate(model: Path, ranks: int, prompts: DataProto) -> list[DataProto]:
    """What the policy says before and after an update, as good as random."""
    config = make_config(model, ranks)
    pool = RayResourcePool([2], use_gpu=False, cpus_per_process=0.5)
    init = partial(ActorRolloutRefWorker, config, "actor_rollout", TOTAL_STEPS)
    group = PolicyWorkers(pool, init, name="actor", group_sizes=group_sizes(config))
    try:
        group.init_model()
        batches = [generate_like_the_actor(group, prompts)]
        batch = batches[0][:4]
        advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None] * batch.batch["response_mask"]
        old = group.compute_log_prob(batch).batch["old_log_probs"]
        columns = {"advantages": advantages, "old_log_probs": old, "graded": torch.ones(4, dtype=torch.bool)}
        group.update_actor(batch.union(DataProto.from_dict(columns)))
        return [*batches, generate_like_the_actor(group, prompts, synced=True)]
    finally:
        group.shutdown()
        pool.release()


def generate_like_the_actor(group: PolicyWorkers, prompts: DataProto, synced: bool = False) -> DataProto:
    batch = group.generate_sequences(prompts)
    assert len(batch) == PROMPTS * SAMPLES
    assert ("perf/weight_sync_gib" in batch.meta_info.pop("metrics")) == synced
    log_probs = group.compute_log_prob(batch).batch["old_log_probs"]
    mask = batch.batch["response_mask"]
    assert torch.allclose(log_probs[mask], batch.batch["rollout_log_probs"][mask], atol=1e-4)
    return batch


@pytest.mark.long
def test_one_engine_over_two_ranks_is_one_engine(make_model: Callable[..., Path], tiny_tokenizer):
    prompts, model = make_prompts(len(tiny_tokenizer)), make_model(key_value_heads=2, tied=False)
    alone, together = (train_and_generate(model, ranks, prompts) for ranks in (1, 2))
    for one, two in zip(alone, together, strict=True):
        assert torch.equal(one.batch["responses"], two.batch["responses"])
        assert torch.allclose(one.batch["rollout_log_probs"], two.batch["rollout_log_probs"], atol=1e-4)
    assert not torch.equal(alone[0].batch["responses"], alone[1].batch["responses"])


@pytest.mark.long
def test_both_ranks_hold_the_one_key_value_head_and_a_tied_embedding(make_model: Callable[..., Path], tiny_tokenizer):
    folder = Path("/dev/shm")
    segments = set(folder.glob("*")) if folder.is_dir() else set()
    train_and_generate(make_model(key_value_heads=1, tied=True), 2, make_prompts(len(tiny_tokenizer)))
    left = (path.name for path in folder.glob("*") if path not in segments)
    assert [name for name in left if name.startswith("psm_") or name.endswith(("cpushm_0", "cpushm_1"))] == []
