"""The `algorithm` section: advantages, and the KL penalty in the reward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from verl.trainer.config.fields import Coefficient, Flag, Positive, PositiveNumber, Section, Share
from verl.trainer.config.policy import KLPenalty


@dataclass(frozen=True, kw_only=True)
class KLControl(Section):
    """The coefficient of the KL penalty."""

    type: Literal["fixed", "adaptive"]
    kl_coef: Coefficient
    horizon: Positive
    target_kl: PositiveNumber


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig(Section):
    """How rewards become advantages."""

    adv_estimator: Literal["grpo", "gae", "rloo", "reinforce_plus_plus", "remax"]
    gamma: Share
    lam: Share
    norm_adv_by_std_in_grpo: Flag
    use_kl_in_reward: Flag
    kl_penalty: KLPenalty
    kl_ctrl: KLControl

    def mistakes(self, responses: int) -> Iterator[str]:
        """A line where there are too few responses to a prompt."""
        if self.adv_estimator in ("grpo", "rloo") and responses < 2:
            yield (
                f"actor_rollout_ref.rollout.n={responses}: algorithm.adv_estimator={self.adv_estimator} compares the "
                "responses to one prompt and needs at least 2"
            )
