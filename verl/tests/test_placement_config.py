"""Placement and kernels: a setting that contradicts itself or cannot act here is one clear line, before any model."""

from __future__ import annotations

import sys

import pytest

from verl.trainer.compose import compose_config
from verl.trainer.config_check import DEFAULTS_FILE, check_config
from verl.trainer.placement_config import FSDP_CONFIGS, OPTIMS, TRAINED, check_kernels, check_placement
from xbai.errors import UserError

MODEL = "actor_rollout_ref.model"


def compose(small_run: list[str], *overrides: str):
    return compose_config(DEFAULTS_FILE.stem, [*small_run, *overrides])


@pytest.mark.parametrize("section", FSDP_CONFIGS)
def test_shard_groups_divide_the_processes(small_run: list[str], section: str) -> None:
    for size in (-1, 1, 2):
        check_placement(compose(small_run, f"{section}.fsdp_size={size}"))
    for size in (0, 3, -2):
        with pytest.raises(UserError, match=rf"^{section}\.fsdp_size={size} must divide the 2 processes"):
            check_placement(compose(small_run, f"{section}.fsdp_size={size}"))


@pytest.mark.parametrize("section", FSDP_CONFIGS)
def test_two_ways_to_offload_exclude_each_other(small_run: list[str], section: str) -> None:
    for key in ("param_offload", "optimizer_offload")[: 1 if ".ref." in section else 2]:
        check_placement(compose(small_run, f"{section}.{key}=true"))
        with pytest.raises(UserError, match=f"^{section}: {key} and offload_policy exclude each other"):
            check_placement(compose(small_run, f"{section}.{key}=true", f"{section}.offload_policy=true"))


@pytest.mark.parametrize("section", FSDP_CONFIGS)
@pytest.mark.parametrize("name", ["float16", "fp16"])
def test_only_what_is_not_trained_may_be_in_float16(small_run: list[str], section: str, name: str) -> None:
    chosen = compose(small_run, f"{section}.compute_dtype={name}")
    if section not in TRAINED:
        check_placement(chosen)
        return
    with pytest.raises(UserError, match=rf"^{section}\.compute_dtype={name} cannot train: small gradients"):
        check_placement(chosen)
    with pytest.raises(UserError, match=rf"^{section}\.model_dtype={name} cannot train"):
        check_placement(compose(small_run, f"+{section}.model_dtype={name}"))


@pytest.mark.parametrize("section", OPTIMS)
def test_what_eight_bits_need_is_said_first(
    small_run: list[str], section: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    said: list[str] = []
    check_kernels(compose(small_run, f"{section}.name=AdamW8bit"), said.append)
    assert len(said) == 1 and said[0].startswith(f"{section}.name=AdamW8bit needs torchao")


def test_what_kernels_need_is_said_first(small_run: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    with pytest.raises(UserError, match=rf"^{MODEL}\.use_liger=true needs a GPU and cannot act on CPU"):
        check_config(compose(small_run, f"{MODEL}.use_liger=true"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    for key in ("use_fused_kernels", "use_torch_compile"):
        with pytest.raises(UserError, match=rf"^{MODEL}\.{key}=true needs a compiler"):
            check_config(compose(small_run, f"{MODEL}.{key}=true"))


def test_two_ways_to_make_kernels_exclude_each_other(small_run: list[str]) -> None:
    compiled = f"{MODEL}.use_torch_compile=true"
    check_placement(compose(small_run, compiled))
    with pytest.raises(UserError, match=f"^{MODEL}: use_liger and use_torch_compile exclude each other"):
        check_placement(compose(small_run, compiled, f"{MODEL}.use_liger=true"))


def test_nonfinite_updates_are_allowed_at_least_once(small_run: list[str]) -> None:
    with pytest.raises(UserError, match=r"actor\.max_nonfinite_updates=0 must be above 0"):
        check_config(compose(small_run, "actor_rollout_ref.actor.max_nonfinite_updates=0"))
