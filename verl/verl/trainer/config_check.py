"""Checks of a composed configuration, before Ray or any model starts: each mistake is one clear line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from verl.trainer.auto_config import AUTO_KEYS
from verl.trainer.batch_config import check_batches
from verl.trainer.checkpoint_config import check_checkpoints
from verl.trainer.compose import leaves
from verl.trainer.critic_config import check_critic
from verl.trainer.overrides import EXTRA_KEYS
from verl.trainer.placement_config import check_kernels, check_placement
from verl.trainer.ppo.core_algos import (
    ADVANTAGE_ESTIMATORS,
    KL_ESTIMATORS,
    KL_LOSS_TYPES,
    LOSS_AGG_MODES,
    check_kl_loss_type,
)
from verl.trainer.reward_config import check_reward
from verl.trainer.rollout_config import check_rollout
from verl.utils.dataset.rl_dataset import file_list
from verl.utils.model_shapes import KNOWN_CONFIGS
from verl.utils.tracking import check_backends
from verl.workers.reward_manager import REWARD_MANAGERS
from xbai.engine.files import DTYPES, check_model_folder
from xbai.engine.weight_files import MissingShardError, stored_tensors
from xbai.errors import UserError
from xbai.parquet import UNREADABLE, not_parquet
from xbai.sprm.objective import LOSSES, TRAINED_AGGREGATIONS

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", ListConfig: "a list"}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
"""OWNER/NAME of a model on the Hub, if that is what a path is."""
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
DEFAULTS_FILE = Path(__file__).parent / "config" / "ppo_trainer.yaml"

_DTYPES = (None, *DTYPES, "fp32", "bf16", "fp16")
_OPTIMIZERS, _WARMUPS = ("AdamW", "AdamW8bit", "Adam8bit"), ("constant", "cosine")
CHOICES: dict[str, tuple[Any, ...]] = {
    "data.truncation": ("error", "left", "right"),
    "actor_rollout_ref.model.head_dtype": (None, "float32", "model"),
    "actor_rollout_ref.score.lang": (None, "en", "zh"),
    "actor_rollout_ref.score.loss": LOSSES,
    "actor_rollout_ref.score.aggregation": TRAINED_AGGREGATIONS,
    "actor_rollout_ref.score.optim.name": _OPTIMIZERS,
    "actor_rollout_ref.score.optim.warmup_style": _WARMUPS,
    "actor_rollout_ref.actor.strategy": ("fsdp", "fsdp2"),
    "actor_rollout_ref.actor.loss_agg_mode": tuple(LOSS_AGG_MODES),
    "actor_rollout_ref.actor.kl_loss_type": (*KL_LOSS_TYPES, "full"),
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
    "actor_rollout_ref.nccl_timeout",
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
    "actor_rollout_ref.rollout.max_num_batched_tokens",
    "actor_rollout_ref.rollout.max_num_seqs",
    "actor_rollout_ref.rollout.val_kwargs.n",
    "critic.grad_clip",
    "critic.cliprange_value",
    "reward_model.timeout_s",
    "reward_model.batch_timeout_s",
    "reward_model.memory_gib",
    "trainer.nnodes",
    "trainer.n_gpus_per_node",
    "trainer.total_epochs",
    "ray_init.timeout_s",
)

NULLABLE: dict[str, type] = {
    "data.val_batch_size": int,
    "actor_rollout_ref.score.model_path": str,
    "actor_rollout_ref.score.channel": int,
    "actor_rollout_ref.actor.ppo_micro_batch_size": int,
    "actor_rollout_ref.actor.clip_ratio_low": float,
    "actor_rollout_ref.actor.clip_ratio_high": float,
    "actor_rollout_ref.actor.tis_imp_ratio_cap": float,
    "actor_rollout_ref.rollout.max_model_len": int,
    "actor_rollout_ref.rollout.enforce_eager": bool,
    "critic.nccl_timeout": int,
    "critic.model.path": str,
    "critic.model.enable_gradient_checkpointing": bool,
    "critic.model.trust_remote_code": bool,
    "critic.model.use_remove_padding": bool,
    "critic.ppo_mini_batch_size": int,
    "critic.ppo_micro_batch_size_per_gpu": int,
    "critic.forward_micro_batch_size_per_gpu": int,
    "critic.use_dynamic_bsz": bool,
    "critic.ppo_max_token_len_per_gpu": int,
    "critic.forward_max_token_len_per_gpu": int,
    "critic.ulysses_sequence_parallel_size": int,
    "critic.ppo_epochs": int,
    "critic.shuffle": bool,
    "critic.max_nonfinite_updates": int,
    "reward_model.num_workers": int,
    "reward_model.max_ungraded_batches": int,
    "custom_reward_function.path": str,
    "trainer.device_tflops": float,
    "trainer.total_training_steps": int,
    "trainer.resume_from_path": str,
    "trainer.default_hdfs_dir": str,
    "trainer.max_actor_ckpt_to_keep": int,
    "trainer.rollout_data_dir": str,
    "ray_init.num_cpus": int,
}
"""Keys for which null means something, and what else they may be; numbers are above 0."""

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


def _raise(message: str) -> None:
    raise UserError(message)


def check_config(config: DictConfig, not_found: Callable[[str], None] | None = None) -> None:
    """Raise a `UserError` for the first thing that is wrong; `trainer.device=auto` becomes what it means here.

    Args:
        config: composed and resolved.
        not_found: for a dry run, which is about other machines than this one: takes what would be said of a file that
            is missing, in place of the error. Nothing then depends on this machine's hardware; `auto` becomes cuda.
    """
    defaults, on_this_machine = OmegaConf.load(DEFAULTS_FILE), not_found is None
    not_found = not_found or _raise
    _check_known(config, defaults)
    check_values(config, defaults, NULLABLE, CHOICES, POSITIVE)
    check_backends(config.trainer.logger, not_found)
    if on_this_machine:
        _check_machine(config)
    elif config.trainer.device == "auto":
        config.trainer.device = "cuda"
    changed = _changed(config, defaults)
    _check_acts(config, changed)
    check_placement(config)
    check_kernels(config, not_found)
    shape = _read_model(not_found, "actor_rollout_ref.model.path", config.actor_rollout_ref.model.path)
    check_rollout(config, shape)
    check_batches(config, shape)
    check_critic(config, changed, shape, partial(_read_model, not_found))
    _check_score(config.actor_rollout_ref, shape, not_found)
    _check_files(config, not_found)
    check_reward(config, changed)
    check_checkpoints(config, not_found)
    _check_weights(config, not_found)


def _check_known(config: DictConfig, defaults: DictConfig) -> None:
    known = {key for key, _ in leaves(defaults)} | set(EXTRA_KEYS)
    for key, _ in leaves(config):
        if key not in known:
            raise UserError(f"{key} is not a key of this trainer (see {DEFAULTS_FILE.name})")


def check_values(
    config: DictConfig,
    defaults: DictConfig,
    nullable: Mapping[str, type],
    choices_of: Mapping[str, tuple[Any, ...]],
    positive: Sequence[str],
    unchecked: Sequence[str] = (),
) -> None:
    """Refuse the first value that is not of its default's kind, not among its choices, or not above 0.

    Args:
        config, defaults: composed, of the same trainer.
        nullable: what the keys may be that may be null.
        choices_of: all that some keys may be.
        positive: keys of numbers.
        unchecked: keys that may be of several kinds.
    """
    default_of = dict(leaves(defaults))
    for key, value in leaves(config):
        if key not in unchecked:
            _check_kind(key, value, default_of.get(key), nullable)
    for key, choices in choices_of.items():
        if (value := OmegaConf.select(config, key)) not in choices:
            raise UserError(f"{key}={value} is unknown, use one of {', '.join(map(str, choices))}")
    for key in positive:
        if (value := OmegaConf.select(config, key)) <= 0:
            raise UserError(f"{key}={value} must be above 0")


def _check_kind(key: str, value: Any, default: Any, nullable: Mapping[str, type]) -> None:
    """Refuse a value of another kind than its default; `nullable` says what the keys may be that may be null."""
    if key in AUTO_KEYS:
        if value != "auto" and not _is(bool, value):
            raise UserError(f"{key}={value} must be true, false or auto")
    elif (kind := nullable.get(key)) is not None:
        is_number = kind in (int, float)
        if value is not None and not (_is(kind, value) and (not is_number or value > 0)):
            raise UserError(f"{key}={value} must be {KINDS[kind]}{' above 0' if is_number else ''}, or null")
    elif default == MISSING:
        if value is None:
            raise UserError(f"{key} must be given, not null")
    elif default is not None and not _is(type(default), value):
        if _is(str, default) and _is(float, value):
            return  # A name may look like a number.
        shown = "null" if value is None else value
        raise UserError(f"{key}={shown} must be {KINDS[type(default)]}, like its default {default}")


def _is(kind: type, value: Any) -> bool:
    expected = (int, float) if kind is float else kind
    return isinstance(value, expected) and (kind is bool or not isinstance(value, bool))


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
    if config.actor_rollout_ref.actor.use_kl_loss:
        check_kl_loss_type(config.actor_rollout_ref.actor.kl_loss_type)
    for key, value in changed.items():
        if config.trainer.device == "cpu" and key in NOT_ON_CPU:
            raise UserError(f"{key}={value} needs a GPU and cannot act on CPU; leave it at its default")
        if config.actor_rollout_ref.rollout.name == "hf" and key in NOT_WITH_HF:
            raise UserError(f"{key}={value} cannot act with rollout.name=hf; leave it at its default, or use vllm")
    if config.ray_init.num_cpus is not None and (os.environ.get("RAY_ADDRESS") or config.trainer.nnodes > 1):
        raise UserError(f"ray_init.num_cpus={config.ray_init.num_cpus} cannot act on a Ray cluster that runs already")


def _read_model(not_found: Callable[[str], None], key: str, folder: str) -> dict[str, Any]:
    """The config.json of the folder that `key` names, in a dry run as far as it is known."""
    try:
        return check_model_folder(folder)
    except UserError as error:
        message = f"{key}: {error}"
        if HUB_NAME.fullmatch(folder):
            message += f" (of a model on the Hub: hf download {folder} --local-dir {folder})"
    if (Path(folder) / "config.json").exists():
        raise UserError(message)
    not_found(message)
    return KNOWN_CONFIGS.get(Path(folder).name, {})


def _check_score(config: DictConfig, shape: Mapping[str, Any], not_found: Callable[[str], None]) -> None:
    if not config.use_score:
        return
    head, channel, hidden_size = config.score.model_path, config.score.channel, shape.get("hidden_size")
    if None not in (channel, hidden_size) and channel != hidden_size:
        raise UserError(f"actor_rollout_ref.score.channel={channel} must be null, or the model's {hidden_size=}")
    if head is not None and not Path(head).exists():
        not_found(f"actor_rollout_ref.score.model_path={head} does not exist")


def _check_files(config: DictConfig, not_found: Callable[[str], None]) -> None:
    needed = [config.data.prompt_key, config.data.reward_fn_key, "reward_model"]
    if not config.data.train_files:
        raise UserError(f"data.train_files={config.data.train_files} names no file")
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


def _check_weights(config: DictConfig, not_found: Callable[[str], None]) -> None:
    for key in ("actor_rollout_ref.model.path", "critic.model.path"):
        path = OmegaConf.select(config, key)
        if path is None or not Path(path).is_dir():
            continue
        if not any(any(Path(path).glob(kind)) for kind in WEIGHTS):
            not_found(f"{key}: {path} has no weights ({' or '.join(WEIGHTS)})")
            continue
        try:
            stored_tensors(path)
        except MissingShardError as error:
            not_found(f"{key}: {error}")


def _columns(key: str, file: str) -> list[str]:
    try:
        metadata = pq.read_metadata(file)
    except UNREADABLE as error:
        raise not_parquet(f"data.{key}: {file} is", error) from error
    if not metadata.num_rows:
        raise UserError(f"data.{key}: {file} has no rows")
    return metadata.schema.to_arrow_schema().names
