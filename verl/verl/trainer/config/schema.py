"""The whole configuration of the RL trainer, typed: ppo_trainer.yaml has the same keys, and all defaults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, NamedTuple

from verl.trainer.config.algorithm import AlgorithmConfig
from verl.trainer.config.critic import CriticConfig
from verl.trainer.config.data import DataConfig
from verl.trainer.config.fields import WITH_CRITIC, Section
from verl.trainer.config.policy import ROOT, ActorRolloutRefConfig
from verl.trainer.config.reward import CustomRewardFunction, RewardModelConfig
from verl.trainer.config.run import RayInit, TrainerConfig
from verl.trainer.config.updates import Job

YAML = "ppo_trainer"


class ReferenceUse(NamedTuple):
    """What the reference policy is needed for; all false: there is none."""

    log_probs: bool
    """Its log-probs of the sampled tokens, a phase of its own."""
    full_kl_in_loss: bool
    """Its hidden states beside the policy's in the update, for `actor.kl_loss_type=full`."""
    full_kl_in_reward: bool
    """The same where the policy's log-probs are computed, for `algorithm.kl_penalty=full`."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig(Section):
    """Frozen: what a run decides for itself is another one, made by `with_values`."""

    data: DataConfig
    actor_rollout_ref: ActorRolloutRefConfig
    critic: Annotated[CriticConfig, WITH_CRITIC]
    reward_model: RewardModelConfig
    custom_reward_function: CustomRewardFunction
    algorithm: AlgorithmConfig
    trainer: TrainerConfig
    ray_init: RayInit

    @property
    def has_critic(self) -> bool:
        """GAE needs values."""
        return self.algorithm.adv_estimator == "gae"

    @property
    def reference_use(self) -> ReferenceUse:
        """By the KL divergences that are asked for."""
        actor, algorithm = self.actor_rollout_ref.actor, self.algorithm
        full_in_loss, full_in_reward = actor.kl_loss_type == "full", algorithm.kl_penalty == "full"
        return ReferenceUse(
            (actor.use_kl_loss and not full_in_loss) or (algorithm.use_kl_in_reward and not full_in_reward),
            actor.use_kl_loss and full_in_loss,
            algorithm.use_kl_in_reward and full_in_reward,
        )

    @property
    def needs_old_log_probs(self) -> bool:
        """Whether the policy's log-probs of a rollout batch are computed before the update.

        Where a rollout batch is one optimiser step, the update's own forward pass has them, and ratios are 1 exactly. A
        pass of their own is needed all the same for a score head, whose step logits before the update decide which
        steps count and how much (see `joint_loss`), for importance weights, and for a KL in the reward.
        """
        root, actor = self.actor_rollout_ref, self.actor_rollout_ref.actor
        one_update = self.data.train_batch_size == actor.ppo_mini_batch_size and actor.ppo_epochs == 1
        used_before = root.use_score or actor.tis_imp_ratio_cap is not None or self.algorithm.use_kl_in_reward
        return used_before or not one_update

    def mistakes(self, policy: Mapping[str, Any], critic: Mapping[str, Any]) -> Iterator[str]:
        """A line for each that keys make together, whatever machine they are for.

        Args:
            policy, critic: the config.json of their models, as far as they are known.
        """
        root, trainer = self.actor_rollout_ref, self.trainer
        yield from self.data.mistakes()
        yield from root.model.mistakes()
        yield from root.actor.mistakes()
        for name, placement in (
            (f"{ROOT}.actor", root.actor.fsdp_config),
            (f"{ROOT}.ref", root.ref.fsdp_config),
            ("critic.model", self.critic.model.fsdp_config),
        ):
            yield from placement.mistakes(f"{name}.fsdp_config", trainer.processes)
        yield from root.rollout.mistakes(trainer.n_gpus_per_node, policy)
        yield from self._batch_mistakes(policy, critic)
        yield from self.algorithm.mistakes(root.rollout.n)
        if root.use_score:
            yield from root.score.mistakes(policy)
        yield from self.reward_model.mistakes(self.data.max_response_length, self.custom_reward_function)
        yield from trainer.mistakes()

    def _batch_mistakes(self, policy: Mapping[str, Any], critic: Mapping[str, Any]) -> Iterator[str]:
        root, data = self.actor_rollout_ref, self.data
        job, packed = Job(data, self.trainer.processes, root.rollout.n), root.model.use_remove_padding
        found = [
            (f"{ROOT}.actor", ROOT, root.actor.batch_mistakes(job, packed, policy)),
            (f"{ROOT}.ref", ROOT, root.ref.sharing_mistakes(job, packed, policy)),
        ]
        if self.has_critic:
            packed = self.critic.model.use_remove_padding
            found.append(("critic", "critic", self.critic.batch_mistakes(job, packed, critic)))
            yield from self.critic.model_mistakes(job, critic, policy)
        said: set[str] = set()
        for section, root_name, lines in found:
            for line in lines:
                # What a section has from the actor is said of the actor.
                if line not in said:
                    yield line.format(section=section, root=root_name)
                said.add(line)
        key = "log_prob_max_token_len_per_gpu"
        if root.ref.log_prob_use_dynamic_bsz:
            yield from root.ref.budget_mistakes(data, f"{ROOT}.ref.{key}", root.ref.log_prob_max_token_len_per_gpu)
        if root.rollout.log_prob_use_dynamic_bsz:
            tokens = root.rollout.log_prob_max_token_len_per_gpu
            yield from root.actor.budget_mistakes(data, f"{ROOT}.rollout.{key}", tokens)
        yield from data.no_room(f"{ROOT}.rollout.max_model_len", root.rollout.max_model_len)
        room = f"max_position_embeddings of {root.model.path}"
        yield from data.no_room(room, policy.get("max_position_embeddings"))


def ppo_config(overrides: Sequence[str]) -> PPOConfig:
    """The defaults with overrides; nothing is looked for on this machine.

    Raises:
        UserError: values that are not what the schema says.
    """
    from verl.trainer.config.compose import compose_config
    from verl.trainer.config.validation import validated

    return validated(PPOConfig, compose_config(YAML, overrides), YAML)


@cache
def ppo_defaults(*overrides: str) -> PPOConfig:
    """`ppo_config` without data and a model, for what needs a section of it."""
    return ppo_config(["data.train_files=none", "actor_rollout_ref.model.path=none", *overrides])
