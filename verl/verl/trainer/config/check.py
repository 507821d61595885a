"""Checks of a composed configuration, before Ray or any model starts: all mistakes are told, each in one clear line."""

from __future__ import annotations

from collections.abc import Callable

from omegaconf import DictConfig

from verl.trainer.config.fields import Missing, told, with_values
from verl.trainer.config.inputs import file_mistakes, model_shape
from verl.trainer.config.machine import device_here, machine_mistakes, missing_kernels
from verl.trainer.config.schema import YAML, PPOConfig
from verl.trainer.config.validation import cannot_act, validated
from verl.utils.tracking import check_backends
from xbai.errors import UserError


def check_config(composed: DictConfig, not_found: Callable[[str], None] | None = None) -> PPOConfig:
    """The typed configuration, with `trainer.device` as it is here and the actor's values for the critic's nulls.

    Args:
        composed: by `compose_config`.
        not_found: for a dry run, which is about other machines than this one: takes what would be said of a file that
            is missing, in place of the error. Nothing then depends on this machine's hardware; `auto` becomes cuda.

    Raises:
        UserError: all that is wrong, a line each: with values for themselves, or else with values together and files.
    """
    config = validated(PPOConfig, composed, YAML)
    missing: list[str] = []
    mistakes = [*told(check_backends, config.trainer.logger, missing.append), *map(Missing, missing)]
    if not_found is None:
        mistakes += machine_mistakes(config.trainer, config.ray_init)
        device = device_here(config.trainer)
    else:
        device = "cpu" if config.trainer.device == "cpu" else "cuda"
    config = with_values(config, {"trainer.device": device})
    mistakes += cannot_act(config, composed, YAML)
    policy_path, critic_path = config.actor_rollout_ref.model.path, config.critic.model.path
    policy = critic = model_shape("actor_rollout_ref.model.path", policy_path, mistakes)
    if config.has_critic and critic_path != policy_path:
        critic = model_shape("critic.model.path", critic_path, mistakes)
    mistakes += missing_kernels(config)
    mistakes += config.mistakes(policy, critic)
    mistakes += file_mistakes(config)
    wrong = [line for line in mistakes if not (not_found and isinstance(line, Missing))]
    if wrong:
        raise UserError("\n".join(dict.fromkeys(wrong)))
    if not_found is not None:
        for line in mistakes:
            not_found(line)
    return config
