"""Placement and kernels: a setting that contradicts itself or cannot act here is one clear line, before any model."""

from __future__ import annotations

import sys

import pytest
from tiny import ppo_config

from verl.trainer.config.check import check_config
from verl.trainer.config.compose import compose_config
from verl.trainer.config.machine import missing_kernels
from verl.trainer.config.rules import rule_mistakes
from verl.trainer.config.schema import YAML, PPOConfig
from xbai.errors import UserError

MODEL = "actor_rollout_ref.model"
TRAINED = ("actor_rollout_ref.actor.fsdp_config", "critic.model.fsdp_config")
FSDP_CONFIGS = (*TRAINED, "actor_rollout_ref.ref.fsdp_config")
OPTIMS = ("actor_rollout_ref.actor.optim", "actor_rollout_ref.score.optim", "critic.optim")


def check(small_run: list[str], *overrides: str) -> PPOConfig:
    return check_config(compose_config(YAML, [*small_run, *overrides]))


def mistakes(small_run: list[str], *overrides: str) -> list[str]:
    """Of values together, whatever machine they are for."""
    return list(rule_mistakes(ppo_config([*small_run, *overrides]), {}, {}))


@pytest.mark.parametrize("section", FSDP_CONFIGS)
def test_shard_groups_divide_the_processes(small_run: list[str], section: str) -> None:
    for size in (-1, 1, 2):
        assert not mistakes(small_run, f"{section}.fsdp_size={size}")
    for size in (0, 3, -2):
        (line,) = mistakes(small_run, f"{section}.fsdp_size={size}")
        assert line.startswith(f"{section}.fsdp_size={size} must divide the 2 processes")


@pytest.mark.parametrize("section", FSDP_CONFIGS)
def test_two_ways_to_offload_exclude_each_other(small_run: list[str], section: str) -> None:
    for key in ("param_offload", "optimizer_offload")[: 1 if ".ref." in section else 2]:
        assert not mistakes(small_run, f"{section}.{key}=true")
        (line,) = mistakes(small_run, f"{section}.{key}=true", f"{section}.offload_policy=true")
        assert line.startswith(f"{section}: {key} and offload_policy exclude each other")


@pytest.mark.parametrize("section", FSDP_CONFIGS)
@pytest.mark.parametrize("name", ["float16", "fp16"])
def test_only_what_is_not_trained_may_be_in_float16(small_run: list[str], section: str, name: str) -> None:
    found = mistakes(small_run, f"{section}.compute_dtype={name}")
    if section not in TRAINED:
        assert not found
        return
    assert len(found) == 1 and found[0].startswith(f"{section}.compute_dtype={name} cannot train: small gradients")
    (line,) = mistakes(small_run, f"+{section}.model_dtype={name}")
    assert line.startswith(f"{section}.model_dtype={name} cannot train")


@pytest.mark.parametrize("section", OPTIMS)
def test_what_eight_bits_need_is_said_first(
    small_run: list[str], section: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    said = list(missing_kernels(ppo_config([*small_run, f"{section}.name=AdamW8bit"])))
    assert len(said) == 1 and said[0].startswith(f"{section}.name=AdamW8bit needs torchao")


def test_what_kernels_need_is_said_first(small_run: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    with pytest.raises(UserError, match=rf"^{MODEL}\.use_liger=true needs a GPU and cannot act on CPU"):
        check(small_run, f"{MODEL}.use_liger=true")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    for key in ("use_fused_kernels", "use_torch_compile"):
        with pytest.raises(UserError, match=rf"^{MODEL}\.{key}=true needs a compiler"):
            check(small_run, f"{MODEL}.{key}=true")


def test_two_ways_to_make_kernels_exclude_each_other(small_run: list[str]) -> None:
    compiled = f"{MODEL}.use_torch_compile=true"
    assert not mistakes(small_run, compiled)
    (line,) = mistakes(small_run, compiled, f"{MODEL}.use_liger=true")
    assert line.startswith(f"{MODEL}: use_liger and use_torch_compile exclude each other")


def test_nonfinite_updates_are_allowed_at_least_once(small_run: list[str]) -> None:
    with pytest.raises(UserError, match=r"actor\.max_nonfinite_updates=0 must be above 0"):
        check(small_run, "actor_rollout_ref.actor.max_nonfinite_updates=0")
