"""Checks of a composed configuration, before Ray or any model starts: all mistakes are told, each in one clear line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from omegaconf import DictConfig
from torch import nn

from verl.checkpoints.remote import check_url, is_url
from verl.checkpoints.weight_files import WEIGHTS
from verl.models.fsdp import decoder_layers
from verl.models.lora import ALL_LINEAR, target_modules
from verl.trainer.config.fields import Missing, told, with_values
from verl.trainer.config.machine import device_here, machine_mistakes, missing_kernels
from verl.trainer.config.rules import rule_mistakes
from verl.trainer.config.schema import YAML, DataConfig, ModelConfig, PPOConfig, TrainerConfig
from verl.trainer.config.validation import cannot_act, validated
from verl.trainer.planning.model_shapes import KNOWN_CONFIGS, config_of
from verl.utils.dataset.rl_dataset import file_list
from verl.utils.tracking import check_backends
from xbai.engine.files import meta_model
from xbai.engine.weight_files import MissingShardError, stored_tensors
from xbai.errors import UserError
from xbai.files import why_not_written
from xbai.model_folder import check_model_folder
from xbai.parquet import UNREADABLE, not_parquet

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
"""OWNER/NAME of a model on the Hub, if that is what a path is."""


def check_config(composed: DictConfig, not_found: Callable[[str], None] | None = None) -> PPOConfig:
    """The typed configuration, with `trainer.device` as it is here and the actor's values for the critic's nulls.

    A dry run, which is about other machines than this one, has a `not_found`, which takes what would be said of a file
    that is missing, in place of the error. Nothing then depends on this machine's hardware; `auto` becomes cuda.

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
    policy = critic = _model_shape("actor_rollout_ref.model.path", policy_path, mistakes)
    if config.has_critic and critic_path != policy_path:
        critic = _model_shape("critic.model.path", critic_path, mistakes)
    mistakes += missing_kernels(config)
    mistakes += rule_mistakes(config, policy, critic)
    mistakes += _file_mistakes(config)
    wrong = [line for line in mistakes if not (not_found and isinstance(line, Missing))]
    if wrong:
        raise UserError("\n".join(dict.fromkeys(wrong)))
    if not_found is not None:
        for line in mistakes:
            not_found(line)
    return config


def _model_shape(key: str, folder: str, mistakes: list[str]) -> dict[str, Any]:
    """The config.json of the folder that `key` names, or what is known without it; `mistakes` gets what is wrong."""
    try:
        return check_model_folder(folder)
    except UserError as error:
        message = f"{key}: {error}"
    if HUB_NAME.fullmatch(folder):
        message += f" (of a model on the Hub: hf download {folder} --local-dir {folder})"
    mistakes.append(message if (Path(folder) / "config.json").exists() else Missing(message))
    return KNOWN_CONFIGS.get(Path(folder).name, {})


def _file_mistakes(config: PPOConfig) -> Iterator[str]:
    """A line for each file or folder that is not what it must be; a `Missing` for each that is not here."""
    score, custom = config.actor_rollout_ref.score.model_path, config.custom_reward_function.path
    if config.actor_rollout_ref.use_score and score is not None and not Path(score).exists():
        yield Missing(f"actor_rollout_ref.score.model_path={score} does not exist")
    yield from _data_mistakes(config.data)
    if custom is not None and not Path(custom).is_file():
        yield Missing(f"custom_reward_function.path={custom} does not exist")
    yield from _checkpoint_mistakes(config.trainer)
    policy, critic = config.actor_rollout_ref.model.path, config.critic.model.path
    yield from _weight_mistakes("actor_rollout_ref.model.path", Path(policy))
    yield from _adapter_mistakes(config.actor_rollout_ref.model)
    if critic != policy:
        yield from _weight_mistakes("critic.model.path", Path(critic))


def _adapter_mistakes(model: ModelConfig) -> Iterator[str]:
    """Of names in `target_modules` that no linear layer has; what keeps a model from being looked at is said of it."""
    names = target_modules(model)
    if not model.lora_rank or names == ALL_LINEAR:
        return
    try:
        if (config := config_of(model.path, model.trust_remote_code)) is None:
            return
        lm = meta_model(config, model.trust_remote_code)
    except UserError:
        return
    modules = (found for layer in decoder_layers(lm) for found in layer.named_modules())
    known = {name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)}
    for name in names:
        if name not in known:
            yield (
                f"actor_rollout_ref.model.target_modules: the decoder layers of {model.path} have no linear layer "
                f"{name!r}, only {', '.join(sorted(known))}"
            )


def _data_mistakes(data: DataConfig) -> Iterator[str]:
    needed = {data.prompt_key, data.reward_fn_key, "reward_model"}
    for key, files in (("train_files", data.train_files), ("val_files", data.val_files)):
        for file in file_list(files):
            if not Path(file).is_file():
                yield Missing(f"data.{key}: {file} does not exist")
                continue
            try:
                metadata = pq.read_metadata(file)
            except UNREADABLE as error:
                yield str(not_parquet(f"data.{key}: {file} is", error))
                continue
            if not metadata.num_rows:
                yield f"data.{key}: {file} has no rows"
                continue
            columns = metadata.schema.to_arrow_schema().names
            for name in sorted(needed.difference(columns)):
                yield f"data.{key}: {file} has no column {name!r}; it has {', '.join(columns)}"
                # Said once, of the first file that lacks it.
                needed.remove(name)


def _weight_mistakes(key: str, folder: Path) -> Iterator[str]:
    if not (folder / "config.json").is_file():
        return  # As has been said of it.
    if not any(any(folder.glob(kind)) for kind in WEIGHTS):
        yield Missing(f"{key}: {folder} has no weights ({' or '.join(WEIGHTS)})")
        return
    try:
        stored_tensors(folder)
    except MissingShardError as error:
        yield Missing(f"{key}: {error}")
    except UserError as error:
        yield str(error)


def _checkpoint_mistakes(trainer: TrainerConfig) -> Iterator[str]:
    if is_url(trainer.default_local_dir):
        yield (
            f"trainer.default_local_dir={trainer.default_local_dir} must be a folder of this machine; checkpoints are "
            "copied to what trainer.default_hdfs_dir names"
        )
    source, by_path = trainer.resume_from_path, trainer.resume_mode == "resume_path"
    if source is not None and not by_path:
        yield f"trainer.resume_from_path={source} acts with trainer.resume_mode=resume_path only"
    elif by_path and not is_url(source) and (source is None or not Path(source).is_dir()):
        yield Missing(f"trainer.resume_from_path={source}: resume_mode=resume_path needs a folder or URL global_step_N")
    folders = {"default_local_dir": trainer.default_local_dir, "rollout_data_dir": trainer.rollout_data_dir}
    for key, folder in folders.items():
        if folder is not None and not is_url(folder):
            yield from _folder_mistakes(f"trainer.{key}={folder}", Path(folder))
    for key, url in (("default_hdfs_dir", trainer.default_hdfs_dir), ("resume_from_path", source)):
        if url is not None and (key == "default_hdfs_dir" or is_url(url)):
            yield from map(Missing, told(check_url, f"trainer.{key}", url))


def _folder_mistakes(setting: str, folder: Path) -> Iterator[str]:
    """A line where a folder cannot be made, or not be written to."""
    try:
        nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except OSError as error:
        yield f"{setting}: cannot be a folder ({why_not_written(error)})"
        return
    if not nearest.is_dir():
        yield Missing(f"{setting}: {nearest} is no folder")
    elif not os.access(nearest, os.W_OK | os.X_OK):
        yield Missing(f"{setting}: {nearest} cannot be written to")
