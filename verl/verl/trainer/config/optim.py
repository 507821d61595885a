"""The `optim` sections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from verl.trainer.config.fields import Coefficient, Field, Flag, Number, PositiveNumber, Section, Share, Whole

Beta = Annotated[Number, Field(ge=0, lt=1)]
AdamName = Literal["AdamW", "AdamW8bit", "Adam8bit"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """What all have: an optimiser with its schedule; the learning rate of 0 leaves the weights as they are."""

    name: AdamName | Literal["Muon"]
    lr: Coefficient
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2, description="must be two numbers from 0 to below 1")]
    weight_decay: Coefficient
    lr_warmup_steps: Whole
    lr_warmup_steps_ratio: Share
    min_lr_ratio: Share
    num_cycles: Coefficient
    warmup_style: Literal["constant", "cosine"]


@dataclass(frozen=True, kw_only=True)
class AdamConfig(OptimConfig):
    """Of the critic, and of a score head that is trained with its backbone."""

    name: AdamName


@dataclass(frozen=True, kw_only=True)
class PolicyOptim(AdamConfig):
    """`actor_rollout_ref.actor.optim`."""

    no_load_optim: Flag


@dataclass(frozen=True, kw_only=True)
class HeadOptim(AdamConfig):
    """`score.optim` where the head is all that is trained."""

    lr: PositiveNumber


@dataclass(frozen=True, kw_only=True)
class SFTOptim(OptimConfig):
    """`optim` of supervised fine-tuning."""

    adamw_lr: PositiveNumber | None
    grad_clip: PositiveNumber

    def mistakes(self) -> Iterator[str]:
        """A line where Muon lacks what it does not train."""
        if self.name == "Muon" and self.adamw_lr is None:
            yield "optim.adamw_lr must be given with optim.name=Muon: of embeddings, LM head and norms"
