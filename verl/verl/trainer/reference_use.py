"""What a configuration needs the reference policy for."""

from __future__ import annotations

from typing import NamedTuple

from omegaconf import DictConfig


class ReferenceUse(NamedTuple):
    """All false: there is none."""

    log_probs: bool
    """Its log-probs of the sampled tokens, a phase of its own."""
    full_kl_in_loss: bool
    """Its hidden states beside the policy's in the update, for `actor.kl_loss_type=full`."""
    full_kl_in_reward: bool
    """The same where the policy's log-probs are computed, for `algorithm.kl_penalty=full`."""

    @classmethod
    def from_config(cls, config: DictConfig) -> ReferenceUse:
        """From the trainer's whole configuration."""
        actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
        full_in_loss, full_in_reward = actor.kl_loss_type == "full", algorithm.kl_penalty == "full"
        return cls(
            (actor.use_kl_loss and not full_in_loss) or (algorithm.use_kl_in_reward and not full_in_reward),
            actor.use_kl_loss and full_in_loss,
            algorithm.use_kl_in_reward and full_in_reward,
        )
