"""Checks of the configuration of training a score head alone, before any model loads."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from verl.trainer.compose import CONFIG_FOLDER
from verl.trainer.config_check import check_values
from verl.utils.tracking import check_backends
from xbai.engine.files import DTYPES, check_model_folder
from xbai.errors import UserError
from xbai.sprm.head import SCORE_MODULE_FILE
from xbai.sprm.objective import LOSSES, TRAINED_AGGREGATIONS

NULLABLE: dict[str, type] = {
    "data.task": str,
    "model.max_batch_tokens": int,
    "score.lang": str,
    "trainer.patience": int,
}
FILES = ("data.train_files", "data.val_files")
CHOICES = {
    "model.dtype": ("auto", *DTYPES),
    "score.lang": (None, "en", "zh"),
    "score.loss": LOSSES,
    "score.aggregation": TRAINED_AGGREGATIONS,
    "score.optim.name": ("AdamW", "AdamW8bit", "Adam8bit"),
    "score.optim.warmup_style": ("constant", "cosine"),
}
POSITIVE = ("data.train_batch_size", "score.grad_clip", "score.optim.lr", "trainer.total_epochs")


def check_score_config(config: DictConfig) -> None:
    """Raise a `UserError` for the first thing that is wrong in a composed and resolved configuration."""
    defaults = OmegaConf.load(CONFIG_FOLDER / "score_trainer.yaml")
    # Other defaults are made of it.
    defaults.trainer.output_dir = "OUT"
    check_values(config, defaults, NULLABLE, CHOICES, POSITIVE, unchecked=FILES)
    if not 0 <= config.score.dropout < 1:
        raise UserError(f"score.dropout={config.score.dropout} must be from 0 to below 1")
    check_backends(config.trainer.logger, _raise)
    check_model_folder(config.model.path)
    _check_output(Path(config.trainer.output_dir), Path(config.model.path))


def _raise(message: str) -> None:
    raise UserError(message)


def _check_output(folder: Path, model: Path) -> None:
    key = f"trainer.output_dir={folder}"
    if (folder / SCORE_MODULE_FILE).exists():
        raise UserError(f"{key} has a head already, {SCORE_MODULE_FILE}; move it away or name another folder")
    if folder.exists() and not folder.samefile(model):
        raise UserError(f"{key} exists already; remove it or name another (or model.path, to put the head there)")
