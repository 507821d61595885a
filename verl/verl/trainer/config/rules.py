"""What the values of a configuration must be together, whatever machine they are for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from verl.models.loading import trained_dtype
from verl.models.ulysses import check_head_counts
from verl.trainer.config.fields import told, value_at
from verl.trainer.config.schema import (
    ACTOR,
    OWN_AGGREGATION,
    ROOT,
    DataConfig,
    FrozenPlacement,
    PPOConfig,
    RolloutConfig,
    Sampling,
    SharedRows,
    TrainedPlacement,
    TrainerConfig,
    UpdateConfig,
)
from verl.utils.tracking import WITH_TABLES
from xbai.engine import SamplingParams
from xbai.engine.tensor_parallel import check_tensor_parallel_size
from xbai.errors import UserError

Shape = Mapping[str, Any]
"""The config.json of a model, as far as it is known."""


def rule_mistakes(config: PPOConfig, policy: Shape, critic: Shape) -> Iterator[str]:
    """A line for each rule that is broken."""
    root, trainer = config.actor_rollout_ref, config.trainer
    yield from _data(config.data)
    if root.model.use_torch_compile and root.model.use_liger is True:
        yield (
            f"{ROOT}.model: use_liger and use_torch_compile exclude each other (both are kernels of the same "
            "operations); set one of them to false"
        )
    if root.model.use_torch_compile and root.model.lora_rank:
        yield (
            f"{ROOT}.model: lora_rank and use_torch_compile exclude each other (nobody has tried to compile layers "
            "with adapters); set use_torch_compile=false, or lora_rank=0"
        )
    if root.actor.use_kl_loss and (kind := root.actor.kl_loss_type) in ("kl", "k1"):
        yield (
            f"{ACTOR}.kl_loss_type={kind} has no gradient as a loss (on-policy its expectation is 0); "
            f"use low_var_kl, mse or full, or {kind}+ (its value, with the gradient of mse); in the reward, "
            f"algorithm.kl_penalty={kind} is right"
        )
    yield from _policy_loss(config)
    for name in (f"{ACTOR}.fsdp_config", f"{ROOT}.ref.fsdp_config", "critic.model.fsdp_config"):
        yield from _placement(name, value_at(config, name), trainer.processes)
    yield from _rollout(root.rollout, trainer, policy)
    yield from _batches(config, policy, critic)
    yield from _room(config, policy)
    if config.algorithm.adv_estimator in ("grpo", "rloo") and root.rollout.n < 2:
        yield (
            f"{ROOT}.rollout.n={root.rollout.n}: algorithm.adv_estimator={config.algorithm.adv_estimator} compares the "
            "responses to one prompt and needs at least 2"
        )
    hidden_size = policy.get("hidden_size")
    if root.use_score and None not in (root.score.channel, hidden_size) and root.score.channel != hidden_size:
        yield f"{ROOT}.score.channel={root.score.channel} must be null, or the model's {hidden_size=}"
    yield from _pooled(config)
    yield from _reward(config)
    yield from _watching(trainer)
    if trainer.length_penalty and not 0 < trainer.length_penalty_coeff <= 2:
        yield (
            f"trainer.length_penalty_coeff={trainer.length_penalty_coeff} must be above 0 and at most 2 with "
            "trainer.length_penalty=true: above 2 a long right answer would be worth less than a wrong one"
        )


def _data(data: DataConfig) -> Iterator[str]:
    if not data.train_files:
        yield f"data.train_files={data.train_files} names no file"
    if not data.curriculum.enable:
        return
    if not data.shuffle:
        yield "data.shuffle=false keeps the order of the files, data.curriculum.enable=true makes one: drop one"
    if data.dataloader_num_workers:
        yield (
            f"data.dataloader_num_workers={data.dataloader_num_workers} cannot act with data.curriculum.enable=true, "
            "which chooses each batch by the ones before it; set it to 0"
        )


def _policy_loss(config: PPOConfig) -> Iterator[str]:
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    if actor.loss == "dr_grpo":
        if algorithm.adv_estimator != "grpo" or algorithm.norm_adv_by_std_in_grpo:
            yield (
                f"{ACTOR}.loss=dr_grpo takes GRPO's advantages as they are, not over their standard deviation: set "
                "algorithm.adv_estimator=grpo algorithm.norm_adv_by_std_in_grpo=false"
            )
        if actor.aggregation != OWN_AGGREGATION["dr_grpo"]:
            yield (
                f"{ACTOR}.loss=dr_grpo divides by a constant; leave {ACTOR}.loss_agg_mode out, or take loss=ppo for "
                f"loss_agg_mode={actor.loss_agg_mode}"
            )
    if actor.tis_imp_ratio_cap is not None and actor.rollout_is is not None:
        yield (
            f"{ACTOR}.tis_imp_ratio_cap={actor.tis_imp_ratio_cap} is short for rollout_is=token with "
            f"rollout_is_threshold={actor.tis_imp_ratio_cap}; leave it out beside rollout_is={actor.rollout_is}"
        )
    elif (sampling := actor.importance_sampling) is not None:
        lower, upper = sampling.bounds
        if lower >= upper:
            yield (
                f"{ACTOR}.rollout_is_threshold={upper} must be above the lower bound {lower:g} of rollout_is_mode=mask "
                "(rollout_is_threshold_lower, or else 1 / rollout_is_threshold)"
            )


def _watching(trainer: TrainerConfig) -> Iterator[str]:
    if trainer.log_samples_freq > 0 and not set(trainer.logger).intersection(WITH_TABLES):
        yield (
            f"trainer.log_samples_freq={trainer.log_samples_freq} needs a logger with tables: add one of "
            f"{', '.join(WITH_TABLES)} to trainer.logger; trainer.rollout_data_dir=FOLDER writes all samples to files"
        )
    last = trainer.total_training_steps
    if last is not None and (never := [step for step in trainer.profile_steps if step > last]):
        yield f"trainer.profile_steps: step {never[0]} is after the last one, trainer.total_training_steps={last}"


def _placement(name: str, section: FrozenPlacement, processes: int) -> Iterator[str]:
    if isinstance(section, TrainedPlacement):
        for key in ("model_dtype", "compute_dtype"):
            if (dtype := getattr(section, key)) is not None:
                yield from told(trained_dtype, dtype, f"{name}.{key}")
    for key in ("param_offload", "optimizer_offload"):
        if section.offload_policy and getattr(section, key, False):
            yield (
                f"{name}: {key} and offload_policy exclude each other (offload_policy keeps weights and optimiser "
                "in CPU memory at all times); set one of them to false"
            )
    size = section.fsdp_size
    if size == 0 or size < -1 or (size > 0 and processes % size):
        yield (
            f"{name}.fsdp_size={size} must divide the {processes} processes (trainer.nnodes * "
            "trainer.n_gpus_per_node), or be -1 for all of them"
        )


def _rollout(rollout: RolloutConfig, trainer: TrainerConfig, shape: Shape) -> Iterator[str]:
    name = f"{ROOT}.rollout"
    if rollout.mode == "async":
        yield f"{name}.mode=async is for verl's agent loops, which this trainer does not have; use mode=sync or partial"
    if rollout.sleep_level != 2 and not rollout.free_cache_engine:
        yield (
            f"{name}.sleep_level={rollout.sleep_level} cannot act with free_cache_engine=false, with which the "
            "engine never sleeps"
        )
    yield from _sampling(name, rollout)
    yield from _sampling(f"{name}.val_kwargs", rollout.val_kwargs)
    size, rollout_gpus, nodes = rollout.tensor_model_parallel_size, trainer.rollout_gpus, trainer.nnodes
    if rollout_gpus % (nodes * size):
        yield (
            f"trainer.rollout_gpus={rollout_gpus} must be a multiple of trainer.nnodes * "
            f"rollout.tensor_model_parallel_size = {nodes} * {size}: each machine has as many, and ranks that share an "
            "engine are on one"
        )
    if size > 1 and rollout.name == "vllm":
        key = f"{name}.tensor_model_parallel_size={size}"
        if not rollout_gpus and trainer.n_gpus_per_node % size:
            yield (
                f"{key} must divide trainer.n_gpus_per_node={trainer.n_gpus_per_node}: ranks that share an engine are "
                "on one machine"
            )
        else:
            yield from told(check_tensor_parallel_size, size, shape, key)


def _sampling(name: str, section: Sampling) -> Iterator[str]:
    # As they were written: 1, not 1.0.
    temperature, top_p = (int(x) if x.is_integer() else x for x in (section.temperature, section.top_p))
    try:
        SamplingParams(temperature=temperature, top_p=top_p, top_k=section.top_k)
    except UserError as error:
        yield f"{name}.{str(error).removeprefix('sampling: ')}"


def _batches(config: PPOConfig, policy: Shape, critic: Shape) -> Iterator[str]:
    root, packed = config.actor_rollout_ref, config.actor_rollout_ref.model.use_remove_padding
    found = [
        (ACTOR, ROOT, _updates(config, root.actor, packed, policy)),
        (f"{ROOT}.ref", ROOT, _sharing(config, root.ref, packed, policy)),
    ]
    if config.has_critic:
        model, longest = config.critic.model, config.data.longest
        for key, needed in (("vocab_size", policy.get("vocab_size", 0)), ("max_position_embeddings", longest)):
            if critic.get(key, needed) < needed:
                yield f"critic.model.path={model.path} has {key} {critic[key]}; the policy's sequences need {needed}"
        found.append(("critic", "critic", _updates(config, config.critic, model.use_remove_padding, critic)))
    said: set[str] = set()
    for section, root_name, lines in found:
        for line in lines:
            # What a section has from the actor is said of the actor.
            if line not in said:
                yield line.format(section=section, root=root_name)
            said.add(line)


def _sharing(config: PPOConfig, section: SharedRows, packed: bool, shape: Shape) -> Iterator[str]:
    """Lines with `{section}` and `{root}` in place of the section's name and what `model` is under."""
    size, processes = section.ulysses_sequence_parallel_size, config.trainer.processes
    if size == 1:
        return
    key = f"{{section}}.ulysses_sequence_parallel_size={size}"
    if processes % size:
        yield f"{key} must divide the {processes} processes (trainer.nnodes * n_gpus_per_node)"
    elif not packed:
        yield f"{key} needs packed sequences: set {{root}}.model.use_remove_padding=true"
    elif (heads := shape.get("num_attention_heads")) is not None:
        found = told(check_head_counts, heads, shape.get("num_key_value_heads") or heads, size)
        yield from (f"{{section}}: {line}" for line in found)


def _updates(config: PPOConfig, section: UpdateConfig, packed: bool, shape: Shape) -> Iterator[str]:
    """As `_sharing`, and sizes that do not divide or have no room."""
    sharing = list(_sharing(config, section, packed, shape))
    yield from sharing
    train, mini = config.data.train_batch_size, section.ppo_mini_batch_size
    responses = config.actor_rollout_ref.rollout.n
    key = f"{{section}}.ppo_mini_batch_size={mini}"
    if mini > train:
        yield (
            f"{key} is more than data.train_batch_size={train}; for one optimiser step with the whole batch write "
            f"{{section}}.ppo_mini_batch_size={train}"
        )
    elif train % mini:
        yield f"data.train_batch_size={train} must be a multiple of {key}"
    sharers = section.ulysses_sequence_parallel_size
    groups = config.trainer.processes // sharers
    if not sharing and mini * responses % groups:
        yield (
            f"{{section}}.ppo_mini_batch_size * rollout.n = {mini} * {responses} = {mini * responses} must "
            f"be a multiple of the {groups} {f'groups of {sharers} processes' if sharers > 1 else 'processes'} "
            "(trainer.nnodes * trainer.n_gpus_per_node)"
        )
    if section.use_dynamic_bsz:
        tokens = section.ppo_max_token_len_per_gpu
        yield from _budget(config.data, section, "{section}.ppo_max_token_len_per_gpu", tokens)


def _room(config: PPOConfig, policy: Shape) -> Iterator[str]:
    """Of budgets that a forward pass alone has, and of what bounds a sequence."""
    data, root, critic = config.data, config.actor_rollout_ref, config.critic
    tokens = critic.forward_max_token_len_per_gpu
    if config.has_critic and critic.use_dynamic_bsz and tokens != critic.ppo_max_token_len_per_gpu:
        yield from _budget(data, critic, "critic.forward_max_token_len_per_gpu", tokens)
    for name, section, sharing in (("ref", root.ref, root.ref), ("rollout", root.rollout, root.actor)):
        key, tokens = f"{ROOT}.{name}.log_prob_max_token_len_per_gpu", section.log_prob_max_token_len_per_gpu
        if section.log_prob_use_dynamic_bsz:
            yield from _budget(data, sharing, key, tokens)
    yield from _no_room(data, f"{ROOT}.rollout.max_model_len", root.rollout.max_model_len)
    yield from _no_room(data, f"max_position_embeddings of {root.model.path}", policy.get("max_position_embeddings"))


def _budget(data: DataConfig, section: SharedRows, key: str, tokens: int) -> Iterator[str]:
    """Where the `tokens` of `key` of each process that shares a row have no room for the longest."""
    size = section.ulysses_sequence_parallel_size
    return _no_room(data, f"{key}{' * ulysses_sequence_parallel_size' if size > 1 else ''}", tokens * size)


def _no_room(data: DataConfig, key: str, bound: int | None) -> Iterator[str]:
    if bound is not None and bound < data.longest:
        yield f"{key}={bound} is less than data.max_prompt_length + data.max_response_length = {data.longest}"


def _pooled(config: PPOConfig) -> Iterator[str]:
    """Of groups that wait, go on in another step, or are replaced."""
    root, algorithm = config.actor_rollout_ref, config.algorithm
    filters, filter_key = algorithm.filter_groups.enable, "algorithm.filter_groups.enable=true"
    separate = f"trainer.rollout_gpus={config.trainer.rollout_gpus}"
    stale = {f"{ROOT}.rollout.mode=partial": root.rollout.carries, separate: config.one_step_off}
    for key, is_asked in {**stale, filter_key: filters}.items():
        if is_asked and algorithm.adv_estimator == "remax":
            otherwise = f"; with {ROOT}.rollout.max_staleness=0 it can" if key == separate else ""
            yield (
                f"{key} cannot act with algorithm.adv_estimator=remax, which samples a baseline for a step's prompts"
                f"{otherwise}"
            )
    if any(stale.values()) and root.actor.importance_sampling is None:
        otherwise = f", or {ROOT}.rollout.max_staleness=0" if config.one_step_off else ""
        yield (
            f"{' and '.join(key for key in stale if stale[key])} trains on tokens of earlier policies, which needs "
            f"importance weights: set {ACTOR}.rollout_is=token, or sequence{otherwise}"
        )
    if all(stale.values()) and root.rollout.max_staleness == 1:
        yield (
            f"{ROOT}.rollout.max_staleness=1 lets no response go on in another step with {separate}, which is one step "
            f"ahead: set it to 2 or more, or {ROOT}.rollout.mode=sync"
        )
    if filters and root.rollout.n < 2:
        yield f"{ROOT}.rollout.n={root.rollout.n}: {filter_key} compares the responses to a prompt and needs at least 2"


def _reward(config: PPOConfig) -> Iterator[str]:
    reward, longest = config.reward_model, config.data.max_response_length
    if reward.reward_manager == "batch" and config.custom_reward_function.path is None:
        yield (
            "reward_model.reward_manager=batch needs custom_reward_function.path, a Python file whose function "
            "takes the lists data_sources, solution_strs, ground_truths and extra_infos"
        )
    if reward.reward_manager == "dapo" and not 0 < reward.overlong_buffer.len <= longest:
        yield (
            f"reward_model.overlong_buffer.len={reward.overlong_buffer.len}: reward_manager=dapo needs it between 1 "
            f"and data.max_response_length={longest}"
        )
