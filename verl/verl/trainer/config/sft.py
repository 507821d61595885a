"""The configuration of supervised fine-tuning, typed: sft_trainer.yaml has the same keys, and all defaults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

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
from verl.trainer.config.optim import AdamConfig, SFTOptim
from verl.trainer.config.placement import Sharding
from xbai.sprm import ScoreObjective

YAML = "sft_trainer"


@dataclass(frozen=True, kw_only=True)
class SFTData(Section):
    """The rows."""

    train_files: Files
    prompt_key: Text
    response_key: Text
    label_key: Text
    train_batch_size: Positive
    micro_batch_size_per_gpu: Positive
    max_length: Positive


@dataclass(frozen=True, kw_only=True)
class SFTModel(Section):
    """The model that training begins with."""

    path: Text
    compute_dtype: Dtype
    enable_gradient_checkpointing: Flag
    trust_remote_code: Flag

    def mistakes(self) -> Iterator[str]:
        """A line for a dtype in which nothing can be trained."""
        return told(trained_dtype, self.compute_dtype, "model.compute_dtype")


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
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

    def mistakes(self) -> Iterator[str]:
        """A line for each."""
        by_path, source = self.resume_mode == "resume_path", self.resume_from_path
        if source is not None and not by_path:
            yield f"trainer.resume_from_path={source} acts with trainer.resume_mode=resume_path only"
        elif by_path and (source is None or not Path(source).is_dir()):
            yield f"trainer.resume_from_path={source}: resume_mode=resume_path needs a folder global_step_N"
        output = Path(self.output_dir).absolute()
        for key, folder in (("default_local_dir", self.default_local_dir), ("log_dir", self.log_dir)):
            if Path(folder).absolute().is_relative_to(output):
                yield (
                    f"trainer.{key}={folder} must lie outside of trainer.output_dir={self.output_dir} (written without "
                    "a slash at its end), which appears at the end"
                )


@dataclass(frozen=True, kw_only=True)
class SFTConfig(Section):
    """All of it."""

    data: SFTData
    model: SFTModel
    optim: SFTOptim
    score: SFTScore
    fsdp_config: Sharding
    trainer: SFTTrainerConfig
