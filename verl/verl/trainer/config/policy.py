"""The `actor_rollout_ref` section: the policy with its score head, its reference and its engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from verl.trainer.config.fields import (
    Coefficient,
    Field,
    Flag,
    Language,
    Number,
    Positive,
    PositiveNumber,
    Section,
    Switch,
    Text,
    Whole,
    told,
)
from verl.trainer.config.optim import AdamConfig, PolicyOptim
from verl.trainer.config.placement import FrozenPlacement, TrainedPlacement
from verl.trainer.config.rollout import RolloutConfig
from verl.trainer.config.score_loss import ScoreLosses
from verl.trainer.config.updates import SharedRows, UpdateConfig
from verl.trainer.ppo.core_algos import check_kl_loss_type

ROOT = "actor_rollout_ref"

KLPenalty = Literal["kl", "abs", "mse", "low_var_kl", "k1", "k2", "k3", "full"]
KLLossType = KLPenalty | Literal["kl+", "abs+", "mse+", "low_var_kl+", "k1+", "k2+", "k3+"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The folder that policy and reference begin with, and the kernels that they run."""

    path: Text
    trust_remote_code: Flag
    enable_gradient_checkpointing: Switch
    use_remove_padding: Flag
    use_liger: Switch
    head_dtype: Literal["float32", "model"] | None
    use_fused_kernels: Switch
    use_torch_compile: Flag

    def mistakes(self) -> Iterator[str]:
        """A line for kernels that exclude each other."""
        if self.use_torch_compile and self.use_liger is True:
            yield (
                f"{ROOT}.model: use_liger and use_torch_compile exclude each other (both are kernels of the same "
                "operations); set one of them to false"
            )


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ScoreLosses):
    """The score head that is trained with the policy."""

    model_path: Text | None
    channel: Positive | None
    lang: Language | None
    loss_coef: Coefficient
    backbone_grad_scale: Coefficient
    standardized_start: Flag
    standardized_updates: Flag
    optim: AdamConfig

    def mistakes(self, shape: Mapping[str, Any]) -> Iterator[str]:
        """A line for a head of another width than the model's, by its config.json."""
        hidden_size = shape.get("hidden_size")
        if None not in (self.channel, hidden_size) and self.channel != hidden_size:
            yield f"{ROOT}.score.channel={self.channel} must be null, or the model's {hidden_size=}"


@dataclass(frozen=True, kw_only=True)
class ActorConfig(UpdateConfig):
    """The policy's loss, its batches and its placement."""

    strategy: Literal["fsdp", "fsdp2"]
    ppo_micro_batch_size: Positive | None
    clip_ratio: PositiveNumber
    clip_ratio_low: PositiveNumber | None
    clip_ratio_high: PositiveNumber | None
    clip_ratio_c: Annotated[Number, Field(gt=1)]
    tis_imp_ratio_cap: PositiveNumber | None
    loss_agg_mode: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
    entropy_coeff: Number
    use_kl_loss: Flag
    kl_loss_coef: Coefficient
    kl_loss_type: KLLossType
    optim: PolicyOptim
    fsdp_config: TrainedPlacement

    def mistakes(self) -> Iterator[str]:
        """A line for an estimate of the KL whose gradient is the score function, of expectation 0."""
        if self.use_kl_loss:
            yield from told(check_kl_loss_type, self.kl_loss_type)


@dataclass(frozen=True, kw_only=True)
class RefConfig(SharedRows):
    """The frozen reference policy."""

    log_prob_micro_batch_size_per_gpu: Positive
    log_prob_use_dynamic_bsz: Flag
    log_prob_max_token_len_per_gpu: Whole
    fsdp_config: FrozenPlacement


@dataclass(frozen=True, kw_only=True)
class ActorRolloutRefConfig(Section):
    """All that the processes of the policy hold."""

    nccl_timeout: Positive
    model: ModelConfig
    use_score: Flag
    score: ScoreConfig
    actor: ActorConfig
    ref: RefConfig
    rollout: RolloutConfig
