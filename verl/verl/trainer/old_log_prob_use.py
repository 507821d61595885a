"""Whether a configuration needs the policy's log-probs of a rollout batch before the update."""

from __future__ import annotations

from omegaconf import DictConfig


def needs_old_log_probs(config: DictConfig) -> bool:
    """Where a rollout batch is one optimiser step, the update's own forward pass has them, and ratios are 1 exactly.

    A pass of their own is needed all the same for a score head, whose step logits before the update decide which steps
    count and how much (see `joint_loss`), for importance weights, and for a KL in the reward.

    Args:
        config: the trainer's whole configuration.
    """
    root, actor = config.actor_rollout_ref, config.actor_rollout_ref.actor
    one_update = config.data.train_batch_size == actor.ppo_mini_batch_size and actor.ppo_epochs == 1
    used_before = root.use_score or actor.tis_imp_ratio_cap is not None or config.algorithm.use_kl_in_reward
    return used_before or not one_update
