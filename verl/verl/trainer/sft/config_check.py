"""What of a supervised run's configuration can be told to be wrong before anything is read or started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from verl.trainer.config.fields import told
from verl.trainer.config.sft import YAML, SFTConfig, SFTTrainerConfig
from verl.trainer.config.validation import validated
from verl.trainer.sft.model_output import IDENTITY_FILE, taken
from xbai.engine.files import check_model_folder
from xbai.engine.weight_files import stored_tensors
from xbai.errors import UserError


def check_config(composed: DictConfig) -> SFTConfig:
    """The typed configuration.

    Raises:
        UserError: all that is wrong, a line each.
    """
    config = validated(SFTConfig, composed, YAML)
    mistakes = [*config.model.mistakes(), *config.optim.mistakes(), *config.trainer.mistakes()]
    mistakes += _output_mistakes(config.trainer)
    mistakes += told(_check_model, config.model.path)
    if mistakes:
        raise UserError("\n".join(mistakes))
    return config


def _check_model(folder: str) -> None:
    check_model_folder(folder)
    stored_tensors(folder)  # Damaged files are refused here.


def _output_mistakes(trainer: SFTTrainerConfig) -> Iterator[str]:
    output = Path(trainer.output_dir)
    own = trainer.resume_mode != "disable" and (output / IDENTITY_FILE).is_file()
    if output.exists() and not own:
        yield taken(output)
