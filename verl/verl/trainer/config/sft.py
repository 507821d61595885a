"""The configuration of supervised fine-tuning, typed: sft_trainer.yaml has the same keys, and all defaults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from omegaconf import DictConfig

from verl.models.loading import trained_dtype
from verl.trainer.config.fields import (
    Coefficient,
    Dropout,
    Dtype,
    Field,
    Files,
    Flag,
    Language,
    Number,
    Positive,
    ResumeMode,
    Section,
    Text,
    Whole,
    told,
)
from verl.trainer.config.schema import AdamConfig, SFTOptim, Sharding
from verl.trainer.config.validation import validated
from xbai.engine.weight_files import stored_tensors
from xbai.errors import UserError
from xbai.model_folder import check_model_folder
from xbai.sprm import ScoreObjective

YAML = "sft_trainer"
IDENTITY_FILE = ".sft_run.json"
"""In `trainer.output_dir`, which run wrote it; hidden, so that it does not travel on with the model."""


class SFTData(Section):
    """The rows."""

    train_files: Files
    prompt_key: Text
    response_key: Text
    label_key: Text
    train_batch_size: Positive
    micro_batch_size_per_gpu: Positive
    max_length: Positive


class SFTModel(Section):
    """The model that training begins with."""

    path: Text
    compute_dtype: Dtype | None
    enable_gradient_checkpointing: Flag
    trust_remote_code: Flag


class SFTScore(Section):
    """The score head, where rows have an outcome."""

    lang: Language | None
    dropout: Dropout
    normalize_features: Flag
    loss_coef: Coefficient
    backbone_grad_scale: Coefficient
    agreement_weighting: Flag
    class_balance: Flag
    standardized_start: Flag
    optim: AdamConfig

    @property
    def objective(self) -> ScoreObjective:
        """The published loss, with these switches."""
        return ScoreObjective(agreement_weighting=self.agreement_weighting, class_balance=self.class_balance)


class SFTTrainerConfig(Section):
    """The run."""

    output_dir: Text
    output_dtype: Text
    total_epochs: Positive
    total_training_steps: Positive | None
    seed: Whole
    project_name: Text
    experiment_name: Text
    logger: list[Text]
    log_dir: Text
    save_freq: Annotated[Whole, Field(description="must be a whole number of steps, or -1 for never")]
    default_local_dir: Text
    max_ckpt_to_keep: Positive | None
    resume_mode: ResumeMode
    resume_from_path: Text | None
    nccl_timeout: Annotated[Number, Field(gt=0, description="must be a number of seconds above 0")]
    log_freq: Whole


class SFTConfig(Section):
    """All of it."""

    data: SFTData
    model: SFTModel
    optim: SFTOptim
    score: SFTScore
    fsdp_config: Sharding
    trainer: SFTTrainerConfig


def check_sft_config(composed: DictConfig) -> SFTConfig:
    """The typed configuration.

    Raises:
        UserError: all that is wrong, a line each, before anything is read or started.
    """
    config = validated(SFTConfig, composed, YAML)
    mistakes = list(told(trained_dtype, config.model.compute_dtype or "float32", "model.compute_dtype"))
    mistakes += [*optim_mistakes(config.optim), *_trainer_mistakes(config.trainer)]
    mistakes += told(_check_model, config.model.path)
    if mistakes:
        raise UserError("\n".join(mistakes))
    return config


def _check_model(folder: str) -> None:
    check_model_folder(folder)
    stored_tensors(folder)  # Damaged files are refused here.


def optim_mistakes(optim: SFTOptim) -> Iterator[str]:
    """A line where Muon lacks what it does not train."""
    if optim.name == "Muon" and optim.adamw_lr is None:
        yield "optim.adamw_lr must be given with optim.name=Muon: of embeddings, LM head and norms"


def _trainer_mistakes(trainer: SFTTrainerConfig) -> Iterator[str]:
    by_path, source = trainer.resume_mode == "resume_path", trainer.resume_from_path
    if source is not None and not by_path:
        yield f"trainer.resume_from_path={source} acts with trainer.resume_mode=resume_path only"
    elif by_path and (source is None or not Path(source).is_dir()):
        yield f"trainer.resume_from_path={source}: resume_mode=resume_path needs a folder global_step_N"
    output = Path(trainer.output_dir)
    for key, folder in (("default_local_dir", trainer.default_local_dir), ("log_dir", trainer.log_dir)):
        if Path(folder).absolute().is_relative_to(output.absolute()):
            yield (
                f"trainer.{key}={folder} must lie outside of trainer.output_dir={trainer.output_dir} (written without "
                "a slash at its end), which appears at the end"
            )
    own = trainer.resume_mode != "disable" and (output / IDENTITY_FILE).is_file()
    if output.exists() and not own:
        yield taken(output)


def taken(folder: Path) -> str:
    """How to say that an output folder is in the way."""
    return f"trainer.output_dir={folder} exists already; remove it or name another"
