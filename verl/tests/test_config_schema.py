"""Typed configurations have the keys of their YAML files, no defaults of their own, and tell all mistakes at once."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from typing import get_args, get_type_hints

import pytest
from omegaconf import OmegaConf
from tiny import ppo_defaults

from verl.models.loading import DTYPES
from verl.trainer.config import fields, score, sft
from verl.trainer.config.check import check_config
from verl.trainer.config.compose import compose_config, leaves
from verl.trainer.config.defaults import plain_defaults
from verl.trainer.config.fields import value_at, with_values
from verl.trainer.config.schema import (
    OWN_AGGREGATION,
    YAML,
    ActorConfig,
    AlgorithmConfig,
    KLLossType,
    PPOConfig,
    RewardModelConfig,
    ScoreLosses,
)
from verl.trainer.config.sft import optim_mistakes
from verl.trainer.config.validation import default_values, schema_leaves, validated
from verl.trainer.ppo.core_algos import KL_ESTIMATORS
from verl.workers.reward_manager import REWARD_MANAGERS
from xbai.errors import UserError
from xbai.sprm.objective import LOSSES, TRAINED_AGGREGATIONS

SCHEMAS = {YAML: PPOConfig, sft.YAML: sft.SFTConfig, score.YAML: score.HeadConfig}


def sections(schema: type) -> Iterator[type]:
    """A schema with all sections below it."""
    yield schema
    for hint in get_type_hints(schema).values():
        if dataclasses.is_dataclass(hint):
            yield from sections(hint)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_yaml_has_the_keys_of_the_schema_and_all_defaults(name: str) -> None:
    assert schema_leaves(SCHEMAS[name]).keys() == default_values(name).keys()
    for section in sections(SCHEMAS[name]):
        for field in dataclasses.fields(section):
            assert field.default is field.default_factory is dataclasses.MISSING, f"{section.__name__}.{field.name}"


def choices(section: type, name: str) -> set[str]:
    return set(get_args(get_type_hints(section)[name]))


def test_closed_sets_are_those_of_the_code() -> None:
    assert choices(AlgorithmConfig, "kl_penalty") == {*KL_ESTIMATORS, "full"}
    with_plus = {f"{kind}+" for kind in KL_ESTIMATORS}
    assert {kind for arm in get_args(KLLossType) for kind in get_args(arm)} == {*KL_ESTIMATORS, *with_plus, "full"}
    assert choices(RewardModelConfig, "reward_manager") == REWARD_MANAGERS.keys()
    assert set(get_args(fields.Dtype)) == DTYPES.keys()
    assert choices(ActorConfig, "loss") == OWN_AGGREGATION.keys()
    assert choices(ScoreLosses, "loss") == set(LOSSES)
    assert choices(ScoreLosses, "aggregation") == set(TRAINED_AGGREGATIONS)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("actor_rollout_ref.actor.optim.lr=-1e-6", "must be at least 0"),
        ("actor_rollout_ref.actor.optim.betas=[0.9]", "must be two numbers from 0 to below 1"),
        ("actor_rollout_ref.actor.optim.min_lr_ratio=2", "must be from 0 to 1"),
        ("actor_rollout_ref.actor.clip_ratio=0", "must be above 0"),
        ("actor_rollout_ref.actor.clip_ratio_c=1", "must be above 1"),
        ("actor_rollout_ref.actor.clip_ratio_high=-0.2", "must be a number above 0, or null"),
        ("actor_rollout_ref.actor.kl_loss_coef=-1", "must be at least 0"),
        ("actor_rollout_ref.score.backbone_grad_scale=nan", "must be at least 0"),
        ("actor_rollout_ref.rollout.gpu_memory_utilization=1.5", "must be above 0 and at most 1"),
        ("algorithm.gamma=1.01", "must be from 0 to 1"),
        ("algorithm.lam=-0.1", "must be from 0 to 1"),
        ("algorithm.kl_ctrl.kl_coef=-0.1", "must be at least 0"),
        ("algorithm.kl_ctrl.horizon=0", "must be above 0"),
        ("critic.optim.weight_decay=-1", "must be at least 0"),
        ("reward_model.overlong_buffer.penalty_factor=-1", "must be at least 0"),
    ],
)
def test_numbers_have_ranges(override: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        ppo_defaults(override)
    key = override.partition("=")[0]
    assert str(refused.value).startswith(f"{key}=") and str(refused.value).endswith(said)


def check_all_are_told(small_run: list[str], wrong: dict[str, str]) -> None:
    """Each override of `wrong` has a line that begins as its value does."""
    with pytest.raises(UserError) as refused:
        check_config(compose_config(YAML, [*small_run, *wrong]))
    lines = str(refused.value).splitlines()
    assert len(lines) == len(wrong)
    assert all(line.startswith(said) for line, said in zip(lines, wrong.values(), strict=True))


def test_all_mistakes_are_told_at_once(small_run: list[str]) -> None:
    wrong = {
        "data.train_batch_size=many": "data.train_batch_size=many must be a whole number, like its default 128",
        "actor_rollout_ref.actor.ppo_epochs=0": "actor_rollout_ref.actor.ppo_epochs=0 must be above 0",
        "critic.shuffle=1": "critic.shuffle=1 must be true or false, or null",
        "algorithm.adv_estimator=magic": "algorithm.adv_estimator=magic is unknown, use one of grpo, ",
        "+trainer.colour=red": "trainer.colour is not a key of this trainer (see ppo_trainer.yaml)",
    }
    check_all_are_told(small_run, wrong)


def test_so_are_those_of_values_together_of_this_machine_and_of_files(small_run: list[str]) -> None:
    wrong = {
        "trainer.logger=[console,neptune]": "trainer.logger: neptune is unknown",
        "actor_rollout_ref.rollout.sleep_level=1": "actor_rollout_ref.rollout.sleep_level=1 needs a GPU",
        "actor_rollout_ref.actor.kl_loss_type=kl": "actor_rollout_ref.actor.kl_loss_type=kl has no gradient",
        "data.train_batch_size=6": "data.train_batch_size=6 must be a multiple of actor_rollout_ref.actor.ppo_mini",
        "data.val_files=nowhere.parquet": "data.val_files: nowhere.parquet does not exist",
        "trainer.resume_from_path=somewhere": "trainer.resume_from_path=somewhere acts with",
    }
    check_all_are_told(small_run, wrong)


def test_what_one_key_has_from_another_is_wrong_once(small_run: list[str]) -> None:
    """The reference shares rows as the actor does, and the critic's nulls are the actor's values."""
    for override in ("ulysses_sequence_parallel_size=3", "ulysses_sequence_parallel_size=2", "ppo_mini_batch_size=3"):
        overrides = ["algorithm.adv_estimator=gae", f"actor_rollout_ref.actor.{override}"]
        with pytest.raises(UserError) as refused:
            check_config(compose_config(YAML, [*small_run, *overrides]))
        assert "\n" not in str(refused.value) and "critic" not in str(refused.value)


def test_checking_changes_nothing(small_run: list[str]) -> None:
    composed = compose_config(YAML, [*small_run, "trainer.device=auto", "trainer.n_gpus_per_node=1"])
    before = OmegaConf.to_yaml(composed)
    assert check_config(composed).trainer.device in ("cpu", "cuda")
    assert OmegaConf.to_yaml(composed) == before


def test_names_may_look_like_numbers() -> None:
    assert ppo_defaults("trainer.experiment_name=7").trainer.experiment_name == "7"


def test_without_hydra_the_defaults_are_the_same() -> None:
    plain = dict(leaves(dataclasses.asdict(plain_defaults())))
    for key, value in leaves(dataclasses.asdict(ppo_defaults())):
        if plain[key] != "???":
            assert (plain[key], type(plain[key])) == (value, type(value)), key


def test_they_are_there_where_pydantic_is_not() -> None:
    missing = "import sys; sys.modules.update(dict.fromkeys(('pydantic', 'hydra', 'omegaconf')))\n"
    code = "from verl.trainer.config.defaults import plain_defaults; print(plain_defaults().trainer.seed)"
    done = subprocess.run([sys.executable, "-c", missing + code], capture_output=True, text=True)
    assert done.stdout == f"{ppo_defaults().trainer.seed}\n", done.stderr


def test_another_value_leaves_the_section_as_it_was() -> None:
    config = ppo_defaults()
    changed = with_values(config, {"trainer.seed": 7, "actor_rollout_ref.actor.optim.lr": 0.5})
    assert (value_at(changed, "trainer.seed"), changed.actor_rollout_ref.actor.optim.lr) == (7, 0.5)
    assert config == ppo_defaults() != changed


def test_muon_needs_a_learning_rate_of_what_is_no_matrix() -> None:
    places = ["data.train_files=none", "model.path=none", "trainer.output_dir=none"]
    for name, said in ((sft.YAML, ["optim.adamw_lr must be given with optim.name=Muon"]), ("make10_sft", [])):
        config = validated(sft.SFTConfig, compose_config(name, [*places, "optim.name=Muon"]), sft.YAML)
        assert [line.partition(":")[0] for line in optim_mistakes(config.optim)] == said
