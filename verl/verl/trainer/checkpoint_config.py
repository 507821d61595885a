"""What a configuration asks of checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

from verl.trainer.ppo.remote_folder import check_url, is_url
from xbai.errors import UserError
from xbai.files import why_not_written


def check_checkpoints(config: DictConfig, not_found: Callable[[str], None]) -> None:
    """Raise a `UserError` for what is wrong.

    Args:
        config: composed.
        not_found: what to do about folders, and packages of file systems, that are missing on this machine.
    """
    trainer = config.trainer
    if is_url(trainer.default_local_dir):
        raise UserError(
            f"trainer.default_local_dir={trainer.default_local_dir} must be a folder of this machine; checkpoints are "
            "copied to what trainer.default_hdfs_dir names"
        )
    if config.data.dataloader_num_workers < 0:
        raise UserError(f"data.dataloader_num_workers={config.data.dataloader_num_workers} must not be below 0")
    source, by_path = trainer.resume_from_path, trainer.resume_mode == "resume_path"
    if source is not None and not by_path:
        raise UserError(f"trainer.resume_from_path={source} acts with trainer.resume_mode=resume_path only")
    if by_path and not is_url(source) and (source is None or not Path(source).is_dir()):
        not_found(f"trainer.resume_from_path={source}: resume_mode=resume_path needs a folder or URL global_step_N")
    urls = {"trainer.default_hdfs_dir": trainer.default_hdfs_dir}
    if is_url(source):
        urls["trainer.resume_from_path"] = source
    for key in ("default_local_dir", "rollout_data_dir"):
        if trainer[key] is not None:
            _check_folder(f"trainer.{key}={trainer[key]}", Path(trainer[key]), not_found)
    for key, url in urls.items():
        if url is not None:
            try:
                check_url(key, url)
            except UserError as error:
                not_found(str(error))


def _check_folder(setting: str, folder: Path, not_found: Callable[[str], None]) -> None:
    """Say where a folder cannot be made, or not be written to."""
    try:
        nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except OSError as error:
        raise UserError(f"{setting}: cannot be a folder ({why_not_written(error)})") from None
    if not nearest.is_dir():
        not_found(f"{setting}: {nearest} is no folder")
    elif not os.access(nearest, os.W_OK | os.X_OK):
        not_found(f"{setting}: {nearest} cannot be written to")
