"""What of a supervised run's configuration can be told to be wrong before anything is read or started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl.trainer.sft.model_output import IDENTITY_FILE, taken
from xbai.engine.files import check_model_folder
from xbai.engine.weight_files import stored_tensors
from xbai.errors import UserError

RESUME_MODES = ("auto", "disable", "resume_path")


def check_config(config: DictConfig) -> None:
    """Raise a `UserError` for the first thing that is wrong."""
    trainer = config.trainer
    if not isinstance(trainer.nccl_timeout, int | float) or trainer.nccl_timeout <= 0:
        raise UserError(f"trainer.nccl_timeout={trainer.nccl_timeout} must be a number of seconds above 0")
    if not _is_whole(trainer.save_freq):
        raise UserError(f"trainer.save_freq={trainer.save_freq} must be a whole number of steps, or -1 for never")
    if (keep := trainer.max_ckpt_to_keep) is not None and not (_is_whole(keep) and keep > 0):
        raise UserError(f"trainer.max_ckpt_to_keep={keep} must be a whole number above 0, or null")
    _check_resuming(trainer)
    _check_folders(trainer)
    check_model_folder(config.model.path)
    stored_tensors(config.model.path)  # Damaged files are refused here.


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_resuming(trainer: DictConfig) -> None:
    mode, source = trainer.resume_mode, trainer.resume_from_path
    if mode not in RESUME_MODES:
        raise UserError(f"trainer.resume_mode={mode} is unknown, use one of {', '.join(RESUME_MODES)}")
    if source is not None and mode != "resume_path":
        raise UserError(f"trainer.resume_from_path={source} acts with trainer.resume_mode=resume_path only")
    if mode == "resume_path" and (source is None or not Path(source).is_dir()):
        raise UserError(f"trainer.resume_from_path={source}: resume_mode=resume_path needs a folder global_step_N")


def _check_folders(trainer: DictConfig) -> None:
    output = Path(trainer.output_dir).absolute()
    for key in ("default_local_dir", "log_dir"):
        if Path(trainer[key]).absolute().is_relative_to(output):
            raise UserError(
                f"trainer.{key}={trainer[key]} must lie outside of trainer.output_dir={trainer.output_dir} (written "
                "without a slash at its end), which appears at the end"
            )
    own = trainer.resume_mode != "disable" and (output / IDENTITY_FILE).is_file()
    if output.exists() and not own:
        raise UserError(taken(Path(trainer.output_dir)))
