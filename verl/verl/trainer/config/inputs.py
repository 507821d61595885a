"""The files and folders that a configuration names: whether they are there, and what they must be."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from verl.checkpoints.remote import check_url, is_url
from verl.trainer.config.data import DataConfig
from verl.trainer.config.fields import Missing, told
from verl.trainer.config.run import TrainerConfig
from verl.trainer.config.schema import PPOConfig
from verl.trainer.planning.model_shapes import KNOWN_CONFIGS
from verl.utils.dataset.rl_dataset import file_list
from xbai.engine.files import check_model_folder
from xbai.engine.weight_files import MissingShardError, stored_tensors
from xbai.errors import UserError
from xbai.files import why_not_written
from xbai.parquet import UNREADABLE, not_parquet

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
"""OWNER/NAME of a model on the Hub, if that is what a path is."""
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def model_shape(key: str, folder: str, mistakes: list[str]) -> dict[str, Any]:
    """The config.json of the folder that `key` names, or what is known without it; `mistakes` gets what is wrong."""
    try:
        return check_model_folder(folder)
    except UserError as error:
        message = f"{key}: {error}"
    if HUB_NAME.fullmatch(folder):
        message += f" (of a model on the Hub: hf download {folder} --local-dir {folder})"
    mistakes.append(message if (Path(folder) / "config.json").exists() else Missing(message))
    return KNOWN_CONFIGS.get(Path(folder).name, {})


def file_mistakes(config: PPOConfig) -> Iterator[str]:
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
    if critic != policy:
        yield from _weight_mistakes("critic.model.path", Path(critic))


def _data_mistakes(data: DataConfig) -> Iterator[str]:
    needed = {data.prompt_key, data.reward_fn_key, "reward_model"}
    for key, files in (("train_files", data.train_files), ("val_files", data.val_files)):
        for file in file_list(files):
            if not Path(file).is_file():
                yield Missing(f"data.{key}: {file} does not exist")
                continue
            try:
                columns = _columns(key, file)
            except UserError as error:
                yield str(error)
                continue
            for name in sorted(needed.difference(columns)):
                yield f"data.{key}: {file} has no column {name!r}; it has {', '.join(columns)}"
                # Said once, of the first file that lacks it.
                needed.remove(name)


def _columns(key: str, file: str) -> list[str]:
    try:
        metadata = pq.read_metadata(file)
    except UNREADABLE as error:
        raise not_parquet(f"data.{key}: {file} is", error) from error
    if not metadata.num_rows:
        raise UserError(f"data.{key}: {file} has no rows")
    return metadata.schema.to_arrow_schema().names


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
