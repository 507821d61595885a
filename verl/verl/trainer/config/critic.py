"""The `critic` section; a null in it stands for what the actor has there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from verl.trainer.config.fields import Flag, NullMeans, Positive, PositiveNumber, Section, Switch, Text
from verl.trainer.config.optim import AdamConfig
from verl.trainer.config.placement import TrainedPlacement
from verl.trainer.config.updates import Job, UpdateConfig

POLICY, ACTOR = "actor_rollout_ref", "actor_rollout_ref.actor"


@dataclass(frozen=True, kw_only=True)
class CriticModel(Section):
    """The folder whose backbone gets a value head."""

    path: Annotated[Text, NullMeans(f"{POLICY}.model.path")]
    enable_gradient_checkpointing: Annotated[Switch, NullMeans(f"{POLICY}.model.enable_gradient_checkpointing")]
    trust_remote_code: Annotated[Flag, NullMeans(f"{POLICY}.model.trust_remote_code")]
    use_remove_padding: Annotated[Flag, NullMeans(f"{POLICY}.model.use_remove_padding")]
    fsdp_config: TrainedPlacement


@dataclass(frozen=True, kw_only=True)
class CriticConfig(UpdateConfig):
    """The critic of `adv_estimator=gae`."""

    nccl_timeout: Annotated[Positive, NullMeans(f"{POLICY}.nccl_timeout")]
    strategy: Literal["fsdp", "fsdp2"]
    model: CriticModel
    optim: AdamConfig
    ppo_mini_batch_size: Annotated[Positive, NullMeans(f"{ACTOR}.ppo_mini_batch_size")]
    ppo_micro_batch_size_per_gpu: Annotated[Positive, NullMeans(f"{ACTOR}.ppo_micro_batch_size_per_gpu")]
    forward_micro_batch_size_per_gpu: Annotated[Positive, NullMeans("critic.ppo_micro_batch_size_per_gpu")]
    use_dynamic_bsz: Annotated[Flag, NullMeans(f"{ACTOR}.use_dynamic_bsz")]
    ppo_max_token_len_per_gpu: Annotated[Positive, NullMeans(f"{ACTOR}.ppo_max_token_len_per_gpu")]
    forward_max_token_len_per_gpu: Annotated[Positive, NullMeans("critic.ppo_max_token_len_per_gpu")]
    ulysses_sequence_parallel_size: Annotated[Positive, NullMeans(f"{ACTOR}.ulysses_sequence_parallel_size")]
    ppo_epochs: Annotated[Positive, NullMeans(f"{ACTOR}.ppo_epochs")]
    shuffle: Annotated[Flag, NullMeans(f"{ACTOR}.shuffle")]
    max_nonfinite_updates: Annotated[Positive, NullMeans(f"{ACTOR}.max_nonfinite_updates")]
    cliprange_value: PositiveNumber

    def batch_mistakes(self, job: Job, packed: bool, shape: Mapping[str, Any]) -> Iterator[str]:
        """Also of the values' budget."""
        yield from super().batch_mistakes(job, packed, shape)
        if self.use_dynamic_bsz and self.forward_max_token_len_per_gpu != self.ppo_max_token_len_per_gpu:
            name = "critic.forward_max_token_len_per_gpu"
            yield from self.budget_mistakes(job.data, name, self.forward_max_token_len_per_gpu)

    def model_mistakes(self, job: Job, shape: Mapping[str, Any], policy: Mapping[str, Any]) -> Iterator[str]:
        """A line for each size of a model that has no room for the policy's sequences.

        Args:
            job: the longest row.
            shape, policy: the config.json of the critic's model and of the policy's, as far as they are known.
        """
        for key, needed in (
            ("vocab_size", policy.get("vocab_size", 0)),
            ("max_position_embeddings", job.data.longest),
        ):
            if shape.get(key, needed) < needed:
                yield (
                    f"critic.model.path={self.model.path} has {key} {shape[key]}; the policy's sequences need {needed}"
                )
