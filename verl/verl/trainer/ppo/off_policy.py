"""Off-policy correction: what a response weighs because what sampled it is not quite the policy that is trained.

The engine computes slightly other probabilities than the trainer, and what it sampled some updates ago is of an older
policy. B is responses, R response tokens; everything is computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from verl.trainer.ppo.policy_losses import LARGEST_LOG_RATIO

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32


def _log_ratios(
    old_log_probs: Float[Tensor, "B R"], rollout_log_probs: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]
) -> Float32[Tensor, "B R"]:
    """Trainer less engine, 0 off the mask."""
    return (old_log_probs.float() - rollout_log_probs.float()).masked_fill(~mask, 0.0)


def geometric_mean_ratios(
    old_log_probs: Float[Tensor, "B R"], rollout_log_probs: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]
) -> Float32[Tensor, "B"]:
    """How much likelier a token is to the trainer than to the engine that sampled it, on geometric average over its
    response; 1 for a response without tokens.

    Unlike the product it does not grow with length, and so tells responses of another policy from long ones.
    """
    log_ratios = _log_ratios(old_log_probs, rollout_log_probs, mask).sum(-1) / mask.sum(-1).clamp(min=1)
    return log_ratios.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


@dataclass(frozen=True)
class ImportanceSampling:
    """Weights under which the policy gradient is that of the trainer's own samples, but for the bias of the bounds."""

    level: Literal["token", "sequence"]
    """A weight is of a token, or of a whole response: without bias, but of a variance that grows with length."""
    mode: Literal["truncate", "mask"]
    """What is beyond the bounds gets the upper one (truncated importance sampling, Ionides 2008), or weighs nothing."""
    upper: float
    lower: float | None = None
    """Of `mask`; None for 1 / `upper`."""

    @property
    def bounds(self) -> tuple[float, float]:
        """What a ratio keeps its weight between."""
        if self.mode == "truncate":
            return 0.0, self.upper
        return 1 / self.upper if self.lower is None else self.lower, self.upper

    def ratios(
        self, old_log_probs: Float[Tensor, "B R"], rollout_log_probs: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]
    ) -> Float32[Tensor, "B _"]:
        """How much likelier each token [B, R], or each response [B, 1], is to the trainer than to the engine.

        Args:
            old_log_probs: of the policy before the update.
            rollout_log_probs: of the engine.
            mask: response tokens; off it the ratio is 1.
        """
        log_ratios = _log_ratios(old_log_probs, rollout_log_probs, mask)
        if self.level == "sequence":
            log_ratios = log_ratios.sum(-1, keepdim=True)
        return log_ratios.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()

    def weights(self, ratios: Float32[Tensor, "B _"]) -> Float32[Tensor, "B _"]:
        """Of these ratios, by mode and bounds."""
        lower, upper = self.bounds
        if self.mode == "truncate":
            return ratios.clamp(max=upper)
        return ratios.masked_fill((ratios < lower) | (ratios > upper), 0.0)


def effective_sample_size(weights: Float[Tensor, "n"]) -> float:
    """Kish's, as a share of the samples: 1 when all weigh alike; nan where none weighs anything."""
    weights = weights.double()
    return float(weights.sum().square() / (len(weights) * weights.square().sum()))
