"""The `critic` section: what its nulls stand for, and its checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl.trainer.batch_config import check_budget, check_training
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
        (critic, ("nccl_timeout",), policy),
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


def check_critic(
    config: DictConfig,
    changed: Mapping[str, Any],
    policy: Mapping[str, Any],
    read_model: Callable[[str, str], Mapping[str, Any]],
) -> None:
    """Raise a `UserError` for the first thing in `critic` that is wrong or cannot act.

    Args:
        config: the trainer's whole configuration.
        changed: every key with another value than its default.
        policy: its config.json, as far as it is known.
        read_model: gives that of another folder, by the key that names it.
    """
    if config.trainer.critic_warmup < 0:
        raise UserError(f"trainer.critic_warmup={config.trainer.critic_warmup} must be at least 0")
    if config.algorithm.adv_estimator != "gae":
        for key, value in changed.items():
            if key.startswith("critic.") or key == "trainer.critic_warmup":
                raise UserError(f"{key}={value} acts only with algorithm.adv_estimator=gae, which has a critic")
        return
    critic, shape = critic_config(config), policy
    if config.critic.model.path is not None:
        shape = read_model("critic.model.path", critic.model.path)
        _check_model(critic.model.path, shape, policy, config)
    check_training("critic", critic, critic.model, config, shape)
    if critic.use_dynamic_bsz:
        sp_size = critic.ulysses_sequence_parallel_size
        check_budget("critic", critic, "forward_max_token_len_per_gpu", sp_size, config)


def _check_model(folder: str, shape: Mapping[str, Any], policy: Mapping[str, Any], config: DictConfig) -> None:
    for key, needed in (
        ("vocab_size", policy.get("vocab_size", 0)),
        ("max_position_embeddings", config.data.max_prompt_length + config.data.max_response_length),
    ):
        if shape.get(key, needed) < needed:
            raise UserError(f"critic.model.path={folder} has {key} {shape[key]}; the policy's sequences need {needed}")
