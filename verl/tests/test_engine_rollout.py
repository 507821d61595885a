"""When the rollout engine sleeps, wakes up and takes weights; what it counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ppo_defaults
from torch import Tensor
from transformers import AutoModelForCausalLM

from verl import DataProto
from verl.trainer.config.fields import with_values
from verl.trainer.config.schema import RolloutConfig
from verl.workers import fsdp_workers, rollout_worker
from verl.workers.fsdp_workers import ActorRolloutRefWorker
from verl.workers.rollout import EngineRollout, engine_rollout
from xbai.sprm import ScoreHead, SPRMConfig, StepRule, step_feature_mask, trajectory_scores

WEIGHTS = {"a": torch.zeros(2**10), "b": torch.zeros(2**9, dtype=torch.bfloat16)}
SYNC = ["wake weights", "policy to the device", "weights a b", "policy off the device", "wake kv_cache"]


class RecordingEngine:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.checks: list[bool] = []

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, parts: list[str]) -> None:
        self.calls += [f"wake {part}" for part in parts]

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], check: bool) -> None:
        self.calls.append(" ".join(["weights", *(name for name, _ in weights)]))
        self.checks.append(check)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> RecordingEngine:
    engine = RecordingEngine()
    monkeypatch.setattr(engine_rollout, "load_engine", lambda *_, **__: engine)
    return engine


def rollout_config(**changes: object) -> RolloutConfig:
    overrides = ["data.max_prompt_length=256", "data.max_response_length=8"]
    overrides += ["actor_rollout_ref.rollout={dtype: float32, max_num_seqs: 8}"]
    return with_values(ppo_defaults(*overrides).actor_rollout_ref.rollout, changes)


def make_rollout(folder: Path, sprm_config: SPRMConfig | None = None, **changes: object) -> EngineRollout:
    model = ppo_defaults(f"actor_rollout_ref.model.path={folder}").actor_rollout_ref.model
    return EngineRollout(rollout_config(**changes), model, pad_token_id=0, sprm_config=sprm_config)


@pytest.fixture
def make_closed_rollout() -> Iterator[Callable[..., EngineRollout]]:
    """As `make_rollout`; at the end engines are closed, the first one, which ends vLLM's process group, last."""
    made: list[EngineRollout] = []

    def make(*args: Any, **changes: Any) -> EngineRollout:
        made.append(make_rollout(*args, **changes))
        return made[-1]

    yield make
    for rollout in reversed(made):
        rollout.engine.close()


def wake_up(rollout: EngineRollout, engine: RecordingEngine) -> dict[str, float]:
    @contextmanager
    def policy_weights() -> Iterator[Iterable[tuple[str, Tensor]]]:
        engine.calls.append("policy to the device")
        yield WEIGHTS.items()
        engine.calls.append("policy off the device")

    return rollout.wake_up(policy_weights)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("on_gpu")
def test_the_kv_cache_comes_after_the_policy_has_gone(engine: RecordingEngine, tiny_model_dir: Path):
    rollout = make_rollout(tiny_model_dir, check_weight_sync=True)
    metrics = wake_up(rollout, engine)
    assert metrics == {"perf/weight_sync_gib": 5 * 2**10 / 2**30}
    assert engine.calls == ["sleep 2", *SYNC]
    assert engine.checks == [True]
    rollout.sleep()
    wake_up(rollout, engine)
    assert engine.calls == 2 * ["sleep 2", *SYNC]


@pytest.mark.usefixtures("on_gpu")
def test_level_1_keeps_weights_that_have_not_changed(engine: RecordingEngine, tiny_model_dir: Path):
    rollout = make_rollout(tiny_model_dir, sleep_level=1)
    assert wake_up(rollout, engine) == {}
    assert engine.calls == ["sleep 1", "wake weights", "wake kv_cache"]
    rollout.sleep()
    rollout.mark_stale()
    wake_up(rollout, engine)
    assert engine.calls[3:] == ["sleep 1", *SYNC]


@pytest.mark.parametrize("frees", [True, False])
def test_an_engine_that_keeps_its_memory_only_takes_weights(
    engine: RecordingEngine, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, frees: bool
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not frees)
    rollout = make_rollout(tiny_model_dir, free_cache_engine=frees)
    wake_up(rollout, engine)
    rollout.sleep()
    rollout.mark_stale()
    wake_up(rollout, engine)
    wake_up(rollout, engine)
    assert engine.calls == SYNC[1:4]
    assert engine.checks == [False]


@pytest.mark.usefixtures("on_gpu")
def test_two_generations_of_a_step_share_one_wake_up(
    engine: RecordingEngine, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    rollout = make_rollout(tiny_model_dir)
    rollout.generate = lambda prompts: engine.calls.append("generate") or prompts
    worker = ActorRolloutRefWorker(ppo_defaults().actor_rollout_ref, "actor_rollout", total_steps=1)
    worker._rollout, worker._policy_weights = rollout, lambda: nullcontext(WEIGHTS.items())
    for module in (fsdp_workers, rollout_worker):
        monkeypatch.setattr(module, "measure_phase", lambda _: nullcontext({}))
    mask = torch.ones(1, 1)
    for meta_info in ({"stay_awake": True}, {"do_sample": False}):
        worker.generate_sequences(DataProto.from_dict({"response_mask": mask}, meta_info=meta_info | {"metrics": {}}))
    wakes_up = ["wake weights", "weights a b", "wake kv_cache"]
    assert engine.calls == ["sleep 2", *wakes_up, "generate", "generate", "sleep 2"]


@pytest.mark.slow
def test_samples_of_a_prompt_share_its_cache_until_the_weights_change(make_tiny_model, make_closed_rollout):
    pytest.importorskip("vllm")
    rollout = make_closed_rollout(make_tiny_model(seed=0), n=4)
    ids = torch.randint(0, 200, (2, 256))
    prompts = DataProto.from_dict({"input_ids": ids, "attention_mask": torch.ones_like(ids), "seed": [1, 2]})
    first = rollout.generate(prompts)
    # One of two blocks of 128 tokens: the last token is always computed.
    assert first.meta_info["metrics"]["rollout/prefix_cache_hit_rate"] == pytest.approx(3 / 4 / 2)
    again = rollout.generate(prompts)
    assert again.meta_info["metrics"]["rollout/prefix_cache_hit_rate"] == pytest.approx(1 / 2)
    assert torch.equal(again.batch["responses"], first.batch["responses"])

    other = make_rollout(make_tiny_model(seed=1), n=4, name="hf")
    weights = dict(other.engine._model.named_parameters())

    @contextmanager
    def policy_weights() -> Iterator[Iterable[tuple[str, Tensor]]]:
        yield ((name, weight.detach()) for name, weight in weights.items())

    rollout.mark_stale()
    rollout.wake_up(policy_weights)
    changed = rollout.generate(prompts)
    assert changed.meta_info["metrics"]["rollout/prefix_cache_hit_rate"] == pytest.approx(3 / 4 / 2)
    fresh = make_closed_rollout(make_tiny_model(seed=1), n=4).generate(prompts)
    assert torch.equal(changed.batch["responses"], fresh.batch["responses"])
    assert torch.equal(changed.batch["rollout_log_probs"], fresh.batch["rollout_log_probs"])
    assert not torch.equal(changed.batch["responses"], first.batch["responses"])
    assert other.generate(prompts).meta_info["metrics"] == {}


def test_a_head_that_is_trained_is_brought_before_the_first_sample(engine: RecordingEngine, tiny_model_dir: Path):
    wake_up(make_rollout(tiny_model_dir, SPRMConfig(StepRule("en", (1,)))), engine)
    wake_up(make_rollout(tiny_model_dir, SPRMConfig(StepRule("en", (1,))), name="hf"), engine)
    assert engine.calls == SYNC[1:4]


@pytest.mark.slow
def test_samples_come_with_the_scores_of_the_head_that_is_trained(make_tiny_model, make_closed_rollout):
    pytest.importorskip("vllm")
    rule = StepRule("en", tuple(range(40, 140)))
    changes = {"n": 4, "response_length": 30, "check_weight_sync": True}
    rollout = make_closed_rollout(make_tiny_model(seed=0), SPRMConfig(rule), **changes)
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(seed=1), dtype=torch.float32)
    head = ScoreHead(model.config.hidden_size).eval()
    heads = ((f"score_head.{name}", weight.detach()) for name, weight in head.named_parameters())

    @contextmanager
    def policy_weights() -> Iterator[Iterable[tuple[str, Tensor]]]:
        yield chain(((name, weight.detach()) for name, weight in model.named_parameters()), heads)

    rollout.wake_up(policy_weights)
    ids = torch.randint(0, 200, (3, 12), generator=torch.Generator().manual_seed(0))
    samples = rollout.generate(DataProto.from_dict({"input_ids": ids, "attention_mask": torch.ones_like(ids)})).batch
    in_response = torch.cat([torch.zeros(12, 12, dtype=torch.bool), samples["response_mask"]], dim=1)
    mask = step_feature_mask(samples["input_ids"], in_response, rule)
    with torch.no_grad():
        features = model(samples["input_ids"], output_hidden_states=True).hidden_states[-2]
        expected = trajectory_scores(head(features), mask)
    assert (mask.sum(-1) > 0).any(), "a response may end before its first step, but not each"
    assert torch.allclose(samples["rollout_scores"], expected, atol=1e-4)
