"""`auto`: kernels that can run here, checkpointing where the memory asks for it, and on CPU what there was before."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from tiny import ppo_config

from verl.trainer import main_ppo
from verl.trainer.config.check import check_config
from verl.trainer.config.compose import compose_config
from verl.trainer.config.machine import CHECKPOINTING, KERNELS, resolve_auto
from verl.trainer.config.schema import YAML, PPOConfig
from verl.trainer.planning.memory_estimate import GIB
from verl.trainer.planning.memory_phases import GPUS_GIB, MARGIN, PhaseMemory
from verl.trainer.planning.report import dry_run
from xbai.errors import UserError

MODEL = "actor_rollout_ref.model"
NAMES = (*KERNELS, CHECKPOINTING)
AUTO_KEYS = [f"{MODEL}.{name}" for name in NAMES]

BASE = [
    f"{MODEL}.path=DeepSeek-R1-Distill-Qwen-1.5B",
    "data.train_files=nowhere.parquet",
    "trainer.device=cuda",
    f"{MODEL}.use_remove_padding=true",
]


def _config(*overrides: str) -> PPOConfig:
    return ppo_config([*BASE, *overrides])


def _resolved(config: PPOConfig, gib: float | None = None) -> tuple[dict[str, bool], dict[str, str]]:
    """Values and lines by the name of the key."""
    config, lines = resolve_auto(config, gib and gib * GIB)
    said = {name: line for name in NAMES for line in lines if f".{name}=auto: " in line}
    return {name: getattr(config.actor_rollout_ref.model, name) for name in NAMES}, said


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Liger were installed, and there was a compiler for GPUs."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: ModuleSpec(name, None))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.8.1")


def test_on_cpu_it_means_what_cpu_runs_have_always_had(small_run: list[str]) -> None:
    config = check_config(compose_config(YAML, small_run))
    values, said = _resolved(config, gib=80)
    assert values == {"use_liger": False, "use_fused_kernels": False, CHECKPOINTING: True}
    assert said.keys() == values.keys()


@pytest.mark.parametrize("value", [True, False])
def test_what_is_said_explicitly_stays(value: bool) -> None:
    config = _config(*(f"{key}={value}" for key in AUTO_KEYS))
    values, said = _resolved(config, gib=80)
    assert set(values.values()) == {value} and not said


@pytest.mark.parametrize("key", AUTO_KEYS)
def test_another_value_is_one_clear_line(key: str, small_run: list[str]) -> None:
    for value in ("yes", "1", "null"):
        with pytest.raises(UserError, match=rf"^{key}=\w+ must be true, false or auto"):
            check_config(compose_config(YAML, [*small_run, f"{key}={value}"]))


@pytest.mark.usefixtures("liger")
def test_liger_is_used_where_it_is_installed_and_knows_the_model(tmp_path: Path) -> None:
    values, said = _resolved(_config())
    assert values["use_liger"]
    assert said["use_liger"] == f"{MODEL}.use_liger=auto: true (liger-kernel 0.8.1 is installed)"
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2}), encoding="utf-8"
    )
    values, said = _resolved(_config(f"{MODEL}.path={tmp_path}"))
    assert not values["use_liger"]
    assert "no kernels are known for gpt2" in said["use_liger"]


def test_without_liger_or_a_compiler_there_are_plain_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    values, said = _resolved(_config())
    assert not values["use_liger"] and not values["use_fused_kernels"]
    assert "liger-kernel is not installed" in said["use_liger"]
    assert "needs a compiler" in said["use_fused_kernels"]


@pytest.mark.parametrize("estimator", ["grpo", "gae"])
def test_activations_are_kept_where_updates_have_room(estimator: str) -> None:
    names, found = (f"algorithm.adv_estimator={estimator}",), {}
    for gib in (24, 40, 60, 80, 140):
        values, said = _resolved(_config(*names), gib)
        found[gib] = values[CHECKPOINTING]
        plain = PhaseMemory.from_config(_config(*names, f"{MODEL}.{CHECKPOINTING}=false"), gib * GIB)
        updates = max(plain.peaks[phase] for phase in ("update", "critic update") if phase in plain.peaks)
        assert found[gib] == (updates * (1 + MARGIN) > gib * GIB)
        assert f"{updates / GIB:.1f} GiB, which {'does not fit' if found[gib] else 'fits'}" in said[CHECKPOINTING]
    assert found[24] and not found[140]


def test_without_a_gpu_to_look_at_checkpointing_stays_on() -> None:
    assert _resolved(_config(), gib=None)[0][CHECKPOINTING]
    assert _resolved(_config(f"{MODEL}.path=nowhere"), gib=80)[0][CHECKPOINTING]


def test_a_dry_run_says_what_it_means_on_every_gpu() -> None:
    report, _ = dry_run(compose_config(YAML, BASE))
    assert "use_liger: auto" not in report
    line = next(line for line in report.splitlines() if line.startswith(f"{MODEL}.{CHECKPOINTING}=auto: "))
    plain = {name: PhaseMemory.from_config(_config(), gib * GIB).checkpointing for name, gib in GPUS_GIB.items()}
    without = [name for name, checkpointing in plain.items() if not checkpointing]
    assert 0 < len(without) < len(GPUS_GIB)
    assert line.endswith(f"auto: false on {', '.join(without)}, else true")


def test_a_run_resolves_it_before_any_worker_starts(
    monkeypatch: pytest.MonkeyPatch, small_run: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from verl.trainer.ppo import ray_trainer

    seen: list[PPOConfig] = []

    class Trainer:
        is_done = True

        def __init__(self, config: PPOConfig) -> None:
            seen.append(config)

        def end_without_training(self) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(ray_trainer, "RayPPOTrainer", Trainer)
    monkeypatch.setattr(sys, "argv", ["main_ppo", *small_run, f"trainer.default_local_dir={tmp_path}"])
    with caplog.at_level("INFO", logger=main_ppo.logger.name):
        main_ppo.main()
    assert [getattr(seen[0].actor_rollout_ref.model, name) for name in NAMES] == [False, False, True]
    assert len([message for message in caplog.messages if "=auto: " in message]) == 3
