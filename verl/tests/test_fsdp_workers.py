"""Two real ranks on Ray: generate, score, update, sync, checkpoint, merge; each step against plain transformers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file
from tiny import ppo_defaults
from transformers import AutoModelForCausalLM

from verl import DataProto
from verl.single_controller import RayResourcePool
from verl.trainer.config.machine import resolve_auto
from verl.trainer.config.schema import ActorRolloutRefConfig
from verl.workers.fsdp_workers import ActorRolloutRefWorker, PolicyWorkers
from xbai.engine import SamplingParams, load_engine
from xbai.errors import UserError

pytestmark = pytest.mark.slow

MERGER = Path(__file__).parents[1] / "scripts" / "model_merger.py"
PROMPTS, SAMPLES, PROMPT_LENGTH, RESPONSE_LENGTH, TOTAL_STEPS = 3, 2, 6, 24, 10
VARIANTS = {"vllm": ("vllm", True, 0), "hf": ("hf", False, 0), "adapters": ("hf", True, 4)}
"""Engine, whether the model it runs ties its embeddings, and the rank of adapters."""


def make_config(model: Path, engine: str, lora_rank: int) -> ActorRolloutRefConfig:
    """The trainer's own defaults, made small."""
    config = ppo_defaults(
        "trainer.device=cpu",
        f"data.max_prompt_length={PROMPT_LENGTH}",
        f"data.max_response_length={RESPONSE_LENGTH}",
        f"actor_rollout_ref.model={{path: {model}, lora_rank: {lora_rank}}}",
        f"actor_rollout_ref.rollout.name={engine}",
        f"actor_rollout_ref.rollout.n={SAMPLES}",
        "actor_rollout_ref.rollout={dtype: float32, temperature: 0.7, max_num_seqs: 16, top_p: 0.9}",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
        "actor_rollout_ref.rollout.val_kwargs.do_sample=false",
        "actor_rollout_ref.actor={ppo_mini_batch_size: 2, ppo_micro_batch_size_per_gpu: 2, optim: {lr: 0.01}}",
        "actor_rollout_ref.score.optim.lr=0.01",
    )
    config, _ = resolve_auto(config, gpu_bytes=None)
    return config.actor_rollout_ref


def make_prompts(vocabulary: int) -> DataProto:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(PROMPT_LENGTH) >= torch.tensor([0, 2, 4])[:, None]).long()
    ids = torch.randint(0, vocabulary, (PROMPTS, PROMPT_LENGTH), generator=generator) * mask
    return DataProto.from_dict({"input_ids": ids, "attention_mask": mask, "seed": [7, 8, 9]})


def add_training_columns(batch: DataProto) -> DataProto:
    rows = len(batch)
    correct = (torch.arange(rows) % 2).float()
    advantages = (2 * correct - 1)[:, None] * batch.batch["response_mask"]
    return batch.union(
        DataProto.from_dict(
            {"advantages": advantages, "correct": correct, "graded": torch.ones(rows, dtype=torch.bool)}
        )
    )


def plant_steps(batch: DataProto, step_id: int) -> None:
    """Random weights seldom end a step: put the token that does into every response of some length."""
    for column in (3, 9, 15):
        present = batch.batch["response_mask"][:, column]
        batch.batch["responses"][present, column] = step_id
        batch.batch["input_ids"][present, PROMPT_LENGTH + column] = step_id


def merge(actor_folder: Path, target: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(MERGER), "--local_dir", str(actor_folder), "--target_dir", str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(params=[*(pytest.param(name, marks=pytest.mark.long) for name in ("vllm", "hf")), "adapters"])
def group(request, make_tiny_model: Callable[..., Path]) -> Iterator[PolicyWorkers]:
    engine, tied, lora_rank = VARIANTS[request.param]
    config = make_config(make_tiny_model(tied=tied), engine, lora_rank)
    pool = RayResourcePool([2], use_gpu=False, cpus_per_process=0.5)
    init = partial(ActorRolloutRefWorker, config, "actor_rollout_ref", TOTAL_STEPS)
    group = PolicyWorkers(pool, init, name="actor")
    group.init_model()
    yield group
    group.shutdown()
    pool.release()


def test_a_step_of_training_and_its_merged_model(request, group: PolicyWorkers, tiny_tokenizer, tmp_path: Path):
    prompts = make_prompts(len(tiny_tokenizer))
    batch = generate_and_compare(group, prompts)
    plant_steps(batch, tiny_tokenizer.convert_tokens_to_ids(".\n\n"))
    update(group, batch)

    after = group.compute_log_prob(batch)
    needed = group.try_saving(str(tmp_path / "try"))
    group.save_checkpoint(str(tmp_path / "global_step_1" / "actor"))
    merged = tmp_path / "merged"
    result = merge(tmp_path / "global_step_1", merged)
    assert result.returncode == 0, result.stderr
    weights = [*load_file(merged / "model.safetensors").values(), *torch.load(merged / "score_module.pt").values()]
    whole = sum(weight.numel() * 4 for weight in weights)
    if request.node.callspec.params["group"] == "adapters":
        assert all(0 < size < whole / 2 for size in needed)
    else:
        assert needed == [whole] * 2
    compare_with_merged(merged, batch, after)
    compare_greedy(group, prompts, merged)

    group.load_checkpoint(str(tmp_path / "global_step_1" / "actor"))
    again = group.compute_log_prob(batch)
    assert torch.equal(again.batch["old_log_probs"], after.batch["old_log_probs"])
    with pytest.raises(UserError, match="no checkpoint here"):
        group.load_checkpoint(str(tmp_path))


def generate_and_compare(group: PolicyWorkers, prompts: DataProto) -> DataProto:
    """Sample; the shapes, the masks and the engine's log-probs must be what the actor sees."""
    batch = group.generate_sequences(prompts)
    assert batch.meta_info.pop("metrics")["perf/generate_tokens_per_s"] > 0
    assert len(batch) == PROMPTS * SAMPLES
    for row in range(len(batch)):
        assert torch.equal(batch.batch["prompts"][row], prompts.batch["input_ids"][row // SAMPLES])
    mask = batch.batch["response_mask"]
    assert torch.equal(batch.batch["attention_mask"][:, PROMPT_LENGTH:].bool(), mask)
    assert not torch.equal(batch.batch["responses"][0], batch.batch["responses"][1])
    repeated = group.generate_sequences(prompts)
    assert torch.equal(repeated.batch["responses"], batch.batch["responses"])

    log_probs = group.compute_log_prob(batch).batch["old_log_probs"]
    difference = (log_probs - batch.batch["rollout_log_probs"])[mask].abs()
    assert difference.mean() < 1e-3
    reference = group.compute_ref_log_prob(batch).batch["ref_log_prob"]
    assert torch.allclose(reference, log_probs, atol=1e-5)
    return batch


def update(group: PolicyWorkers, batch: DataProto) -> None:
    for compute in (group.compute_log_prob, group.compute_ref_log_prob):
        result = compute(batch)
        result.meta_info.pop("metrics")
        batch.union(result)
    add_training_columns(batch)
    assert batch.batch["step_feature_mask"].any()
    with pytest.raises(UserError, match="ppo_mini_batch_size=2 prompts of 2 responses must divide"):
        group.update_actor(batch)
    metrics = group.update_actor(batch[:4]).meta_info["metrics"]
    assert metrics["actor/grad_norm"] > 0 and metrics["score/grad_norm"] > 0
    assert metrics["actor/skipped_updates"] == 0


def compare_with_merged(merged: Path, batch: DataProto, after: DataProto) -> None:
    """The merged model's log-probs and step scores, in plain transformers and in vLLM, must be the updated actor's, and
    no longer the old ones."""
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    engine = load_engine("vllm", merged, dtype="float32", with_scores=True, max_num_seqs=4)
    changed = 0.0
    for row in range(len(batch)):
        kept = batch.batch["attention_mask"][row].bool()
        ids, prompt_length = batch.batch["input_ids"][row][kept], int(kept[:PROMPT_LENGTH].sum())
        with torch.no_grad():
            logits = model(ids[None]).logits[0, prompt_length - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(-1, ids[prompt_length:, None]).squeeze(-1)
        found = after.batch["old_log_probs"][row][: len(expected)]
        assert torch.allclose(found, expected, atol=1e-4)
        changed += float((found - batch.batch["old_log_probs"][row][: len(expected)]).abs().sum())
        features = after.batch["step_feature_mask"][row]
        step_scores = after.batch["old_step_logits"][row][features].sigmoid()
        scored = engine.score([ids.tolist()], [prompt_length])[0]
        assert torch.allclose(torch.tensor(scored.step_scores), step_scores, atol=1e-5)
    assert changed > 0.1
    prompt = batch.batch["prompts"][0].tolist()
    greedy = SamplingParams(temperature=0.0, max_tokens=RESPONSE_LENGTH)
    expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=RESPONSE_LENGTH)
    assert engine.generate([prompt], greedy)[0][0].token_ids == expected[0, PROMPT_LENGTH:].tolist()
    engine.close()


def compare_greedy(group: PolicyWorkers, prompts: DataProto, merged: Path) -> None:
    """After the weight sync, greedy responses of the engine must be the merged model's."""
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    prompts.meta_info["validate"] = True
    greedy = group.generate_sequences(prompts)
    assert len(greedy) == PROMPTS
    for row in range(PROMPTS):
        kept = prompts.batch["attention_mask"][row].bool()
        ids = prompts.batch["input_ids"][row][kept][None]
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=RESPONSE_LENGTH
        )
        response = greedy.batch["responses"][row][greedy.batch["response_mask"][row]]
        assert response.tolist() == expected[0, ids.shape[1] :].tolist()
