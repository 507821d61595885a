"""The `critic` section: what its nulls stand for, and its checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from xbai.engine.files import check_model_folder
from xbai.errors import UserError

SHARED_WITH_ACTOR = (
    "ppo_mini_batch_size",
    "ppo_micro_batch_size_per_gpu",
    "use_dynamic_bsz",
    "ppo_max_token_len_per_gpu",
    "ppo_epochs",
    "shuffle",
    "max_nonfinite_updates",
    "ulysses_sequence_parallel_size",
)
SHARED_WITH_POLICY = ("path", "trust_remote_code", "use_remove_padding", "enable_gradient_checkpointing")


def critic_config(config: DictConfig) -> DictConfig:
    """The resolved `critic` section with the actor's values for its nulls, and `rollout_n`, the responses per prompt.

    Args:
        config: the trainer's whole configuration.
    """
    critic = OmegaConf.create(OmegaConf.to_container(config.critic, resolve=True))
    policy = config.actor_rollout_ref
    for section, keys, model in (
        (critic, SHARED_WITH_ACTOR, policy.actor),
        (critic.model, SHARED_WITH_POLICY, policy.model),
    ):
        for key in keys:
            section[key] = model[key] if section[key] is None else section[key]
    for key in ("micro_batch_size_per_gpu", "max_token_len_per_gpu"):
        if critic[f"forward_{key}"] is None:
            critic[f"forward_{key}"] = critic[f"ppo_{key}"]
    critic.rollout_n = policy.rollout.n
    return critic


def check_critic(config: DictConfig, changed: Mapping[str, Any], not_found: Callable[[str], None]) -> None:
    """Raise a `UserError` for the first thing in `critic` that is wrong or cannot act.

    Args:
        config: the trainer's whole configuration.
        changed: every key with another value than its default.
        not_found: takes what is to be said of a missing file.
    """
    if config.trainer.critic_warmup < 0:
        raise UserError(f"trainer.critic_warmup={config.trainer.critic_warmup} must be at least 0")
    if config.algorithm.adv_estimator != "gae":
        for key, value in changed.items():
            if key.startswith("critic.") or key == "trainer.critic_warmup":
                raise UserError(f"{key}={value} acts only with algorithm.adv_estimator=gae, which has a critic")
        return
    critic = critic_config(config)
    _check_sizes(critic, config)
    if config.critic.model.path is not None:
        _check_model(critic.model.path, config, not_found)


def _check_model(folder: str, config: DictConfig, not_found: Callable[[str], None]) -> None:
    try:
        found, policy = check_model_folder(folder), check_model_folder(config.actor_rollout_ref.model.path)
    except UserError as error:
        if (Path(folder) / "config.json").exists():
            raise UserError(f"critic.model.path: {error}") from None
        not_found(f"critic.model.path: {error}")
        return
    for key, needed in (
        ("vocab_size", policy.get("vocab_size", 0)),
        ("max_position_embeddings", config.data.max_prompt_length + config.data.max_response_length),
    ):
        if found.get(key, needed) < needed:
            raise UserError(f"critic.model.path={folder} has {key} {found[key]}; the policy's sequences need {needed}")


def _check_sizes(critic: DictConfig, config: DictConfig) -> None:
    above_zero = ("ppo_mini_batch_size", "ppo_micro_batch_size_per_gpu", "forward_micro_batch_size_per_gpu")
    for key in (
        *above_zero,
        "ppo_epochs",
        "max_nonfinite_updates",
        "grad_clip",
        "cliprange_value",
        "ulysses_sequence_parallel_size",
    ):
        if critic[key] <= 0:
            raise UserError(f"critic.{key}={critic[key]} must be above 0")
    world, sp_size = config.trainer.nnodes * config.trainer.n_gpus_per_node, critic.ulysses_sequence_parallel_size
    if world % sp_size:
        raise UserError(f"critic.ulysses_sequence_parallel_size={sp_size} must divide the {world} processes")
    if sp_size > 1 and not critic.model.use_remove_padding:
        raise UserError(
            f"critic.ulysses_sequence_parallel_size={sp_size} needs packed sequences: set "
            "critic.model.use_remove_padding=true"
        )
    if config.data.train_batch_size % critic.ppo_mini_batch_size:
        raise UserError(
            f"data.train_batch_size={config.data.train_batch_size} must be a multiple of "
            f"critic.ppo_mini_batch_size={critic.ppo_mini_batch_size}"
        )
    rows = critic.ppo_mini_batch_size * critic.rollout_n
    if rows % (world // sp_size):
        raise UserError(
            f"critic.ppo_mini_batch_size * rollout.n = {rows} must be a multiple of the {world // sp_size} "
            "processes that have rows of their own"
        )
    longest = config.data.max_prompt_length + config.data.max_response_length
    for key in ("ppo_max_token_len_per_gpu", "forward_max_token_len_per_gpu"):
        if critic.use_dynamic_bsz and critic[key] * sp_size < longest:
            raise UserError(
                f"critic.{key}={critic[key]} is less than data.max_prompt_length + data.max_response_length = {longest}"
            )
