"""The configuration of training a score head alone, typed: score_trainer.yaml has the same keys, and all defaults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from verl.trainer.config.fields import (
    Dropout,
    Files,
    Flag,
    Language,
    Positive,
    PositiveNumber,
    Section,
    ServedDtype,
    Text,
    Whole,
    told,
)
from verl.trainer.config.schema import AdamConfig, ScoreLosses
from verl.trainer.config.validation import validated
from verl.utils.tracking import check_backends
from xbai.errors import UserError
from xbai.model_folder import check_model_folder
from xbai.sprm.head import SCORE_MODULE_FILE

YAML = "score_trainer"


class HeadData(Section):
    """The responses to learn from."""

    train_files: Files
    val_files: Files | None
    task: Text | None
    train_batch_size: Positive


class HeadModel(Section):
    """The model that reads them."""

    path: Text
    dtype: ServedDtype
    max_batch_tokens: Positive | None
    trust_remote_code: Flag


class HeadOptim(AdamConfig):
    """The head is all that is trained, so it must be."""

    lr: PositiveNumber


class HeadScore(ScoreLosses):
    """The head and its loss."""

    lang: Language | None
    dropout: Dropout
    normalize_features: Flag
    standardize: Flag
    grad_clip: PositiveNumber
    optim: HeadOptim


class HeadTrainer(Section):
    """The run."""

    output_dir: Text
    features_dir: Text
    log_dir: Text
    total_epochs: Positive
    patience: Positive | None
    seed: Whole
    project_name: Text
    experiment_name: Text
    logger: list[Text]


class HeadConfig(Section):
    """All of it."""

    data: HeadData
    model: HeadModel
    score: HeadScore
    trainer: HeadTrainer


def check_score_config(composed: DictConfig) -> HeadConfig:
    """The typed configuration.

    Raises:
        UserError: all that is wrong, a line each.
    """
    config = validated(HeadConfig, composed, YAML)
    missing: list[str] = []
    mistakes = [*told(check_backends, config.trainer.logger, missing.append), *missing]
    mistakes += told(check_model_folder, config.model.path)
    mistakes += _output_mistakes(Path(config.trainer.output_dir), Path(config.model.path))
    if mistakes:
        raise UserError("\n".join(mistakes))
    return config


def _output_mistakes(folder: Path, model: Path) -> Iterator[str]:
    key = f"trainer.output_dir={folder}"
    if (folder / SCORE_MODULE_FILE).exists():
        yield f"{key} has a head already, {SCORE_MODULE_FILE}; move it away or name another folder"
    elif folder.exists() and not (model.exists() and folder.samefile(model)):
        yield f"{key} exists already; remove it or name another (or model.path, to put the head there)"
