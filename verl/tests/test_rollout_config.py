"""Each key of the rollout section acts or is one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from verl.trainer.config.check import check_config
from verl.trainer.config.compose import compose_config
from verl.trainer.config.schema import YAML, PPOConfig
from xbai.errors import UserError

VLLM = "actor_rollout_ref.rollout.name=vllm"
ROLLOUT = "actor_rollout_ref.rollout"
PARTIAL = [f"{ROLLOUT}.mode=partial", "actor_rollout_ref.actor.rollout_is=token"]
SEPARATE = ["trainer.rollout_gpus=1", "actor_rollout_ref.actor.rollout_is=token"]
WAITING = f"{ROLLOUT}.max_staleness=0"
FILTER = "algorithm.filter_groups.enable=true"


def check(overrides: list[str]) -> PPOConfig:
    return check_config(compose_config(YAML, overrides))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([f"{ROLLOUT}.mode=async"], "mode=async is for verl's agent loops, which this trainer does not have"),
        ([f"{ROLLOUT}.mode=partial"], r"needs importance weights: set actor_rollout_ref\.actor\.rollout_is=token"),
        ([f"{ROLLOUT}.over_sampling=0.3"], "over_sampling=0.3 cannot act with rollout.mode=sync, only with partial"),
        ([*PARTIAL, f"{ROLLOUT}.over_sampling=-0.5"], r"over_sampling=-0\.5 must be at least 0"),
        ([*PARTIAL, f"{ROLLOUT}.max_staleness=-1"], "max_staleness=-1 must not be below 0"),
        ([*PARTIAL, "algorithm.adv_estimator=remax"], "mode=partial cannot act with algorithm.adv_estimator=remax"),
        ([FILTER, "algorithm.adv_estimator=remax"], "enable=true cannot act with algorithm.adv_estimator=remax"),
        ([FILTER, f"{ROLLOUT}.n=1", "algorithm.adv_estimator=gae"], "compares the responses to a prompt and needs at"),
        ([f"{ROLLOUT}.max_staleness=1"], "acts only with rollout.mode=partial or trainer.rollout_gpus above 0"),
        (["trainer.rollout_gpus=-1"], "rollout_gpus=-1 must not be below 0"),
        (["trainer.rollout_gpus=1"], "rollout_gpus=1 trains on tokens of earlier policies, which needs importance"),
        ([*SEPARATE, f"{ROLLOUT}.mode=partial", f"{ROLLOUT}.max_staleness=1"], "one step ahead: set it to 2 or more"),
        ([*SEPARATE, "algorithm.adv_estimator=remax"], r"remax, which .* with actor_.*max_staleness=0 it can"),
        ([*SEPARATE, f"{ROLLOUT}.tensor_model_parallel_size=2"], r"=1 must be a multiple of .* = 1 \* 2"),
        (["algorithm.filter_groups.metric=reward"], "acts only with algorithm.filter_groups.enable=true"),
        ([f"{ROLLOUT}.temperature=2.5"], r"rollout\.temperature=2\.5: from 0 \(greedy\) to 2"),
        ([f"{ROLLOUT}.val_kwargs.top_p=0"], r"rollout\.val_kwargs\.top_p=0: above 0 and at most 1"),
        ([f"{ROLLOUT}.val_kwargs.top_k=-2"], r"rollout\.val_kwargs\.top_k=-2: a positive count, or -1"),
        ([f"{ROLLOUT}.max_num_seqs=0"], "max_num_seqs=0 must be above 0"),
        ([f"{ROLLOUT}.sleep_level=3"], "sleep_level=3 is unknown, use one of 1, 2"),
        ([f"{ROLLOUT}.sleep_level=1"], "sleep_level=1 needs a GPU and cannot act on CPU"),
        ([f"{ROLLOUT}.free_cache_engine=false"], "free_cache_engine=False needs a GPU"),
        ([f"{ROLLOUT}.tensor_model_parallel_size=0"], "tensor_model_parallel_size=0 must be above 0"),
        ([f"{ROLLOUT}.tensor_model_parallel_size=4"], "=4 must divide trainer.n_gpus_per_node=2"),
        (
            [f"{ROLLOUT}.tensor_model_parallel_size=2", f"{ROLLOUT}.name=hf"],
            "tensor_model_parallel_size=2 cannot act with rollout.name=hf",
        ),
        (
            [f"{ROLLOUT}.tensor_model_parallel_size=4", "trainer.n_gpus_per_node=4"],
            "=4 must divide the model's num_attention_heads=2",
        ),
    ],
)
def test_a_key_that_cannot_act_is_one_line(
    small_run: list[str], monkeypatch: pytest.MonkeyPatch, overrides: list[str], said: str
):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    with pytest.raises(UserError, match=said):
        check([*small_run, VLLM, *overrides])


def test_what_only_a_gpu_has(small_run: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    on_gpu = [*small_run, VLLM, "trainer.device=cuda", f"{ROLLOUT}.sleep_level=1"]
    check(on_gpu)
    with pytest.raises(UserError, match="sleep_level=1 cannot act with free_cache_engine=false"):
        check([*on_gpu, f"{ROLLOUT}.free_cache_engine=false"])
    with pytest.raises(UserError, match=r"gpu_memory_utilization=1\.5 must be above 0 and at most 1"):
        check([*on_gpu, f"{ROLLOUT}.gpu_memory_utilization=1.5"])
    with pytest.raises(UserError, match=r"n_gpus_per_node=2 with trainer\.rollout_gpus=1 needs 3 GPUs; .*node=1"):
        check([*on_gpu[:-1], *SEPARATE])
    with pytest.raises(UserError, match=r"sleep_level=1 cannot act with trainer\.rollout_gpus=1, with which"):
        check([*on_gpu, *SEPARATE, "trainer.n_gpus_per_node=1"])


def test_what_divides_passes(small_run: list[str], tiny_model_dir: Path):
    check([*small_run, VLLM, f"{ROLLOUT}.tensor_model_parallel_size=2", f"{ROLLOUT}.check_weight_sync=true"])


def test_partial_rollouts_that_carry_nothing_are_sync(small_run: list[str]):
    assert check([*small_run, *PARTIAL]).pools_rollouts and check([*small_run, FILTER]).pools_rollouts
    assert not check([*small_run, f"{ROLLOUT}.mode=partial", f"{ROLLOUT}.max_staleness=0"]).pools_rollouts


def test_engines_on_gpus_of_their_own_need_no_correction_where_they_wait(small_run: list[str]):
    tp = f"{ROLLOUT}.tensor_model_parallel_size=2"
    waiting = check([*small_run, VLLM, "trainer.n_gpus_per_node=1", "trainer.rollout_gpus=2", WAITING, tp])
    assert not waiting.one_step_off and not waiting.pools_rollouts
    check([*small_run, "trainer.rollout_gpus=1", WAITING, "algorithm.adv_estimator=remax"])
    ahead = check([*small_run, *SEPARATE])
    assert ahead.one_step_off and ahead.pools_rollouts and not ahead.actor_rollout_ref.rollout.carries
