"""Checks of a composed configuration, before Ray or any model starts: each mistake is one clear line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from omegaconf import DictConfig, OmegaConf

from verl.trainer.checkpoint_config import check_checkpoints
from verl.trainer.critic_config import check_critic
from verl.trainer.placement_config import check_kernels, check_placement
from verl.trainer.ppo.core_algos import ADVANTAGE_ESTIMATORS, KL_ESTIMATORS, LOSS_AGG_MODES
from verl.trainer.reward_config import check_reward
from verl.trainer.rollout_check import check_rollout
from verl.utils.dataset.rl_dataset import file_list
from verl.utils.model_shapes import KNOWN_CONFIGS
from verl.utils.tracking import BACKENDS
from verl.utils.ulysses import check_head_counts
from verl.workers.reward_manager import REWARD_MANAGERS
from xbai.engine.files import DTYPES, check_model_folder
from xbai.errors import UserError

DEFAULTS_FILE = Path(__file__).parent / "config" / "ppo_trainer.yaml"

EXTRA_KEYS = (
    "actor_rollout_ref.actor.fsdp_config.model_dtype",
    "actor_rollout_ref.rollout.swap_space",
    "actor_rollout_ref.rollout.chat_scheduler",
)
"""Keys without a default that command lines add with `+`."""

_DTYPES = (None, *DTYPES, "fp32", "bf16", "fp16")
_OPTIMIZERS, _WARMUPS = ("AdamW", "AdamW8bit", "Adam8bit"), ("constant", "cosine")
CHOICES: dict[str, tuple[Any, ...]] = {
    "data.truncation": ("error", "left", "right"),
    "actor_rollout_ref.score.lang": (None, "en", "zh"),
    "actor_rollout_ref.score.optim.name": _OPTIMIZERS,
    "actor_rollout_ref.score.optim.warmup_style": _WARMUPS,
    "actor_rollout_ref.actor.strategy": ("fsdp", "fsdp2"),
    "actor_rollout_ref.actor.loss_agg_mode": tuple(LOSS_AGG_MODES),
    "actor_rollout_ref.actor.kl_loss_type": (*KL_ESTIMATORS, "full"),
    "actor_rollout_ref.actor.optim.name": _OPTIMIZERS,
    "actor_rollout_ref.actor.optim.warmup_style": _WARMUPS,
    "actor_rollout_ref.actor.fsdp_config.model_dtype": _DTYPES,
    "actor_rollout_ref.actor.fsdp_config.compute_dtype": _DTYPES,
    "actor_rollout_ref.ref.fsdp_config.compute_dtype": _DTYPES,
    "critic.strategy": ("fsdp", "fsdp2"),
    "critic.model.fsdp_config.compute_dtype": _DTYPES,
    "critic.optim.name": _OPTIMIZERS,
    "critic.optim.warmup_style": _WARMUPS,
    "actor_rollout_ref.rollout.name": ("vllm", "hf"),
    "actor_rollout_ref.rollout.mode": ("sync", "async"),
    "actor_rollout_ref.rollout.sleep_level": (1, 2),
    "actor_rollout_ref.rollout.dtype": ("auto", *DTYPES),
    "reward_model.reward_manager": tuple(REWARD_MANAGERS),
    "algorithm.adv_estimator": tuple(ADVANTAGE_ESTIMATORS),
    "algorithm.kl_penalty": (*KL_ESTIMATORS, "full"),
    "algorithm.kl_ctrl.type": ("fixed", "adaptive"),
    "trainer.device": ("auto", "cuda", "cpu"),
    "trainer.resume_mode": ("auto", "disable", "resume_path"),
}

POSITIVE = (
    "data.train_batch_size",
    "data.max_prompt_length",
    "data.max_response_length",
    "actor_rollout_ref.actor.ppo_mini_batch_size",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
    "actor_rollout_ref.actor.ppo_epochs",
    "actor_rollout_ref.actor.max_nonfinite_updates",
    "actor_rollout_ref.actor.grad_clip",
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size",
    "actor_rollout_ref.ref.ulysses_sequence_parallel_size",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu",
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "actor_rollout_ref.rollout.temperature",
    "actor_rollout_ref.rollout.val_kwargs.n",
    "reward_model.timeout_s",
    "reward_model.batch_timeout_s",
    "reward_model.memory_gib",
    "trainer.nnodes",
    "trainer.n_gpus_per_node",
    "trainer.total_epochs",
)

NOT_ON_CPU = (
    "actor_rollout_ref.actor.fsdp_config.param_offload",
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload",
    "actor_rollout_ref.actor.fsdp_config.offload_policy",
    "actor_rollout_ref.ref.fsdp_config.param_offload",
    "actor_rollout_ref.ref.fsdp_config.offload_policy",
    "actor_rollout_ref.rollout.gpu_memory_utilization",
    "actor_rollout_ref.rollout.free_cache_engine",
    "actor_rollout_ref.rollout.sleep_level",
    "critic.model.fsdp_config.param_offload",
    "critic.model.fsdp_config.optimizer_offload",
    "critic.model.fsdp_config.offload_policy",
)
NOT_WITH_HF = (
    "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "actor_rollout_ref.rollout.sleep_level",
    "actor_rollout_ref.rollout.gpu_memory_utilization",
    "actor_rollout_ref.rollout.max_num_batched_tokens",
    "actor_rollout_ref.rollout.free_cache_engine",
    "actor_rollout_ref.rollout.enforce_eager",
)

TOKEN_BUDGETS = (
    ("actor_rollout_ref.actor", "use_dynamic_bsz", "ppo_max_token_len_per_gpu"),
    ("actor_rollout_ref.ref", "log_prob_use_dynamic_bsz", "log_prob_max_token_len_per_gpu"),
    ("actor_rollout_ref.rollout", "log_prob_use_dynamic_bsz", "log_prob_max_token_len_per_gpu"),
)
"""Sections with a switch for token budgets and the budget, which must hold the longest sequence."""


def _raise(message: str) -> None:
    raise UserError(message)


def check_config(config: DictConfig, not_found: Callable[[str], None] | None = None) -> None:
    """Raise a `UserError` for the first thing that is wrong; `trainer.device=auto` becomes what it means here.

    Args:
        config: composed and resolved.
        not_found: for a dry run, which is about other machines than this one: takes what would be said of a file that
            is missing, in place of the error. Nothing then depends on this machine's hardware; `auto` becomes cuda.
    """
    defaults = OmegaConf.load(DEFAULTS_FILE)
    _check_known(config, defaults)
    _check_values(config, defaults)
    if not_found is None:
        _check_machine(config)
    elif config.trainer.device == "auto":
        config.trainer.device = "cuda"
    not_found = not_found or _raise
    changed = _changed(config, defaults)
    _check_acts(config, changed)
    check_placement(config)
    check_kernels(config, not_found)
    _check_sequence_parallel(config, not_found)
    check_rollout(config, lambda: _model_config(config.actor_rollout_ref.model.path, not_found))
    _check_batch_sizes(config)
    check_critic(config, changed, not_found)
    _check_lengths(config, not_found)
    _check_model(config.actor_rollout_ref, not_found)
    _check_files(config, not_found)
    check_reward(config, changed)
    check_checkpoints(config, not_found)


def leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of `node` with its value; None for one that must be given and is not."""
    for name in node:
        key = f"{prefix}{name}"
        value = None if OmegaConf.is_missing(node, name) else node[name]
        if isinstance(value, DictConfig):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def _check_known(config: DictConfig, defaults: DictConfig) -> None:
    known = {key for key, _ in leaves(defaults)} | set(EXTRA_KEYS)
    for key, _ in leaves(config):
        if key not in known:
            raise UserError(f"{key} is not a key of this trainer (see {DEFAULTS_FILE.name})")


def _check_values(config: DictConfig, defaults: DictConfig) -> None:
    default_of = dict(leaves(defaults))
    for key, value in leaves(config):
        default = default_of.get(key)
        if value is None or default is None or isinstance(default, str):
            continue
        expected = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, expected) or (isinstance(value, bool) and not isinstance(default, bool)):
            raise UserError(f"{key}={value} must be a {_kind(default)}, like its default {default}")
    for key, choices in CHOICES.items():
        if (value := OmegaConf.select(config, key)) not in choices:
            raise UserError(f"{key}={value} is unknown, use one of {', '.join(map(str, choices))}")
    for key in POSITIVE:
        if (value := OmegaConf.select(config, key)) is None or value <= 0:
            raise UserError(f"{key}={value} must be above 0")
    if unknown := [name for name in config.trainer.logger if name not in BACKENDS]:
        raise UserError(f"trainer.logger: {unknown[0]} is unknown, use some of {', '.join(BACKENDS)}")


def _kind(default: Any) -> str:
    kinds = {bool: "true or false", int: "whole number", float: "number"}
    return kinds.get(type(default), "list")


def _check_machine(config: DictConfig) -> None:
    """Resolve `trainer.device`; refuse more processes than this machine has room for."""
    trainer, gpus, cores = config.trainer, torch.cuda.device_count(), os.cpu_count() or 1
    wanted = trainer.n_gpus_per_node
    small = (
        "to run small on CPU: trainer.device=cpu trainer.n_gpus_per_node=2 with a tiny model, "
        "as scripts/quickstart.sh does"
    )
    # On a cluster the driver may run on a machine without GPUs; Ray then finds out whether there is room.
    on_cluster = trainer.nnodes > 1 or bool(os.environ.get("RAY_ADDRESS"))
    if trainer.device == "auto":
        if on_cluster and not gpus:
            raise UserError(
                "trainer.device=auto looks at this machine only, which has no GPU; for the cluster (trainer.nnodes, "
                "RAY_ADDRESS) set it to cuda or cpu"
            )
        trainer.device = "cuda" if gpus else "cpu"
        if not gpus and wanted > cores:
            raise UserError(
                f"trainer.n_gpus_per_node={wanted} needs {wanted} GPUs a machine; this one has none, and {cores} CPU "
                f"cores; {small}"
            )
    if trainer.device == "cuda" and not on_cluster and gpus < wanted:
        less = f"set trainer.n_gpus_per_node={gpus}, or " if gpus else ""
        raise UserError(
            f"trainer.n_gpus_per_node={wanted} needs {wanted} GPUs; this machine has {gpus or 'none'}; {less}{small}"
        )


def _changed(config: DictConfig, defaults: DictConfig) -> dict[str, Any]:
    default_of = dict(leaves(defaults))
    return {key: value for key, value in leaves(config) if value != default_of.get(key)}


def _check_acts(config: DictConfig, changed: Mapping[str, Any]) -> None:
    for key, value in changed.items():
        if config.trainer.device == "cpu" and key in NOT_ON_CPU:
            raise UserError(f"{key}={value} needs a GPU and cannot act on CPU; leave it at its default")
        if config.actor_rollout_ref.rollout.name == "hf" and key in NOT_WITH_HF:
            raise UserError(f"{key}={value} cannot act with rollout.name=hf; leave it at its default, or use vllm")
    cap = config.actor_rollout_ref.actor.tis_imp_ratio_cap
    if cap is not None and not (isinstance(cap, int | float) and cap > 0):
        raise UserError(f"actor_rollout_ref.actor.tis_imp_ratio_cap={cap} must be a number above 0, or null for none")
    if config.ray_init.num_cpus is not None and (os.environ.get("RAY_ADDRESS") or config.trainer.nnodes > 1):
        raise UserError(f"ray_init.num_cpus={config.ray_init.num_cpus} cannot act on a Ray cluster that runs already")


def _check_sequence_parallel(config: DictConfig, not_found: Callable[[str], None]) -> None:
    world, model = config.trainer.nnodes * config.trainer.n_gpus_per_node, config.actor_rollout_ref.model
    for section in ("actor", "ref"):
        key = f"actor_rollout_ref.{section}.ulysses_sequence_parallel_size"
        if (size := OmegaConf.select(config, key)) == 1:
            continue
        if world % size:
            raise UserError(f"{key}={size} must divide the {world} processes (trainer.nnodes * n_gpus_per_node)")
        if not model.use_remove_padding:
            raise UserError(f"{key}={size} needs packed sequences: set actor_rollout_ref.model.use_remove_padding=true")
        shape = _model_config(model.path, not_found)
        if (heads := shape.get("num_attention_heads")) is not None:
            check_head_counts(heads, shape.get("num_key_value_heads") or heads, size)


def _check_batch_sizes(config: DictConfig) -> None:
    actor_rollout_ref, world = config.actor_rollout_ref, config.trainer.nnodes * config.trainer.n_gpus_per_node
    n, train, mini = (
        actor_rollout_ref.rollout.n,
        config.data.train_batch_size,
        actor_rollout_ref.actor.ppo_mini_batch_size,
    )
    if train % mini:
        raise UserError(
            f"data.train_batch_size={train} must be a multiple of actor_rollout_ref.actor.ppo_mini_batch_size={mini}"
        )
    sp = actor_rollout_ref.actor.ulysses_sequence_parallel_size
    if mini * n % (world // sp):
        sharers = f"groups of {sp} processes" if sp > 1 else "processes"
        raise UserError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size * rollout.n = {mini} * {n} = {mini * n} must be a multiple "
            f"of the {world // sp} {sharers} (trainer.nnodes * trainer.n_gpus_per_node)"
        )
    if config.algorithm.adv_estimator in ("grpo", "rloo") and n < 2:
        raise UserError(
            f"actor_rollout_ref.rollout.n={n}: algorithm.adv_estimator={config.algorithm.adv_estimator} compares the "
            "responses to one prompt and needs at least 2"
        )


def _check_lengths(config: DictConfig, not_found: Callable[[str], None]) -> None:
    """Everything that bounds a sequence must have room for the longest prompt with the longest response."""
    needed = config.data.max_prompt_length + config.data.max_response_length
    bounds = {"actor_rollout_ref.rollout.max_model_len": config.actor_rollout_ref.rollout.max_model_len}
    for section, switch, budget in TOKEN_BUDGETS:
        if OmegaConf.select(config, f"{section}.{switch}"):
            size = config.actor_rollout_ref[
                "ref" if section.endswith(".ref") else "actor"
            ].ulysses_sequence_parallel_size
            times = " * ulysses_sequence_parallel_size" if size > 1 else ""
            bounds[f"{section}.{budget}{times}"] = OmegaConf.select(config, f"{section}.{budget}") * size
    folder = config.actor_rollout_ref.model.path
    positions = _model_config(folder, not_found).get("max_position_embeddings")
    bounds[f"max_position_embeddings of {folder}"] = positions
    for key, bound in bounds.items():
        if bound is not None and bound < needed:
            raise UserError(f"{key}={bound} is less than data.max_prompt_length + data.max_response_length = {needed}")


def _model_config(folder: str, not_found: Callable[[str], None]) -> dict[str, Any]:
    try:
        return check_model_folder(folder)
    except UserError as error:
        message = f"actor_rollout_ref.model.path: {error}"
    if (Path(folder) / "config.json").exists():
        raise UserError(message)
    not_found(message)
    return KNOWN_CONFIGS.get(Path(folder).name, {})


def _check_model(config: DictConfig, not_found: Callable[[str], None]) -> None:
    head = config.score.model_path
    if config.use_score and head is not None and not Path(head).exists():
        not_found(f"actor_rollout_ref.score.model_path={head} does not exist")


def _check_files(config: DictConfig, not_found: Callable[[str], None]) -> None:
    needed = [config.data.prompt_key, config.data.reward_fn_key, "reward_model"]
    for key in ("train_files", "val_files"):
        for file in file_list(config.data[key]):
            if not Path(file).is_file():
                not_found(f"data.{key}: {file} does not exist")
                continue
            columns = _columns(key, file)
            if missing := [name for name in needed if name not in columns]:
                raise UserError(f"data.{key}: {file} has no column {missing[0]!r}; it has {', '.join(columns)}")
    if config.custom_reward_function.path is not None and not Path(config.custom_reward_function.path).is_file():
        not_found(f"custom_reward_function.path={config.custom_reward_function.path} does not exist")


def _columns(key: str, file: str) -> list[str]:
    try:
        return pq.read_schema(file).names
    except pa.ArrowInvalid as error:
        raise UserError(f"data.{key}: {file} is not a parquet file") from error
