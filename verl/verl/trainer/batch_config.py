"""What a configuration asks of batches: how rows, and the tokens of one row, divide among the processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from verl.utils.ulysses import check_head_counts
from xbai.errors import UserError

ROOT = "actor_rollout_ref"


def check_batches(config: DictConfig, shape: Mapping[str, Any]) -> None:
    """Raise a `UserError` for the first size of policy and reference that does not divide or has no room.

    Args:
        config: composed and resolved.
        shape: the model's config.json, as far as it is known.
    """
    root = config.actor_rollout_ref
    check_training(f"{ROOT}.actor", root.actor, root.model, config, shape)
    check_sequence_parallel(f"{ROOT}.ref", root.ref, root.model, config, shape)
    for name, shared in (("ref", root.ref), ("rollout", root.actor)):
        budget, sp_size = "log_prob_max_token_len_per_gpu", shared.ulysses_sequence_parallel_size
        if root[name].log_prob_use_dynamic_bsz:
            check_budget(f"{ROOT}.{name}", root[name], budget, sp_size, config)
    if config.algorithm.adv_estimator in ("grpo", "rloo") and root.rollout.n < 2:
        raise UserError(
            f"{ROOT}.rollout.n={root.rollout.n}: algorithm.adv_estimator={config.algorithm.adv_estimator} compares the "
            "responses to one prompt and needs at least 2"
        )
    check_room(f"{ROOT}.rollout.max_model_len", root.rollout.max_model_len, config)
    check_room(f"max_position_embeddings of {root.model.path}", shape.get("max_position_embeddings"), config)


def check_training(
    name: str, section: Mapping[str, Any], model: Mapping[str, Any], config: DictConfig, shape: Mapping[str, Any]
) -> None:
    """Raise a `UserError` for the first size in the section `name` of a model that is trained, policy or critic.

    Args:
        name: `actor_rollout_ref.actor` or `critic`.
        section: this section, without nulls.
        model: the section of the model's path.
        config: the trainer's whole configuration.
        shape: the model's config.json, as far as it is known.
    """
    check_sequence_parallel(name, section, model, config, shape)
    train, n, mini = config.data.train_batch_size, config.actor_rollout_ref.rollout.n, section["ppo_mini_batch_size"]
    if mini > train:
        raise UserError(
            f"{name}.ppo_mini_batch_size={mini} is more than data.train_batch_size={train}; for one optimiser step "
            f"with the whole batch write {name}.ppo_mini_batch_size={train}"
        )
    if train % mini:
        raise UserError(f"data.train_batch_size={train} must be a multiple of {name}.ppo_mini_batch_size={mini}")
    sp_size, processes = section["ulysses_sequence_parallel_size"], _processes(config)
    if mini * n % (processes // sp_size):
        sharers = f"groups of {sp_size} processes" if sp_size > 1 else "processes"
        raise UserError(
            f"{name}.ppo_mini_batch_size * rollout.n = {mini} * {n} = {mini * n} must be a multiple of the "
            f"{processes // sp_size} {sharers} (trainer.nnodes * trainer.n_gpus_per_node)"
        )
    if section["use_dynamic_bsz"]:
        check_budget(name, section, "ppo_max_token_len_per_gpu", sp_size, config)


def check_sequence_parallel(
    name: str, section: Mapping[str, Any], model: Mapping[str, Any], config: DictConfig, shape: Mapping[str, Any]
) -> None:
    """Raise a `UserError` where processes cannot share rows as the section asks; arguments as of `check_training`."""
    size, processes = section["ulysses_sequence_parallel_size"], _processes(config)
    if size == 1:
        return
    key = f"{name}.ulysses_sequence_parallel_size={size}"
    if processes % size:
        raise UserError(f"{key} must divide the {processes} processes (trainer.nnodes * n_gpus_per_node)")
    if not model["use_remove_padding"]:
        root = name.partition(".")[0]
        raise UserError(f"{key} needs packed sequences: set {root}.model.use_remove_padding=true")
    if (heads := shape.get("num_attention_heads")) is not None:
        try:
            check_head_counts(heads, shape.get("num_key_value_heads") or heads, size)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None


def check_budget(name: str, section: Mapping[str, Any], key: str, sp_size: int, config: DictConfig) -> None:
    """Raise a `UserError` where the `section[key]` tokens of each of `sp_size` processes have no room for one row."""
    times = " * ulysses_sequence_parallel_size" if sp_size > 1 else ""
    check_room(f"{name}.{key}{times}", section[key] * sp_size, config)


def check_room(key: str, bound: int | None, config: DictConfig) -> None:
    """Raise a `UserError` where `bound` tokens are less than the longest prompt with the longest response."""
    longest = config.data.max_prompt_length + config.data.max_response_length
    if bound is not None and bound < longest:
        raise UserError(f"{key}={bound} is less than data.max_prompt_length + data.max_response_length = {longest}")


def _processes(config: DictConfig) -> int:
    return config.trainer.nnodes * config.trainer.n_gpus_per_node
