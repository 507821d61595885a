"""The policy losses, token by token: PPO's clipped objective, GSPO and CISPO.

Tokens may lie in any shape. What each weighs in the loss is `token_weights`' matter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

LARGEST_LOG_RATIO = 20.0
"""Only keeps what has diverged finite: an infinite ratio times an advantage of 0 would be nan."""


class PolicyLoss(NamedTuple):
    """Per-token outcome of a policy loss."""

    loss: Float[Tensor, "*tokens"]
    clipped: Bool[Tensor, "*tokens"]
    """The ratio left the clip range: of PPO and GSPO in the direction that the advantage pushes."""
    dual_clipped: Bool[Tensor, "*tokens"]
    """The ratio passed `clip_ratio_c` under a negative advantage; of PPO alone."""
    approx_kl: Float[Tensor, "*tokens"]
    """old minus new log-probability (the k1 estimate of KL(old, new))."""


def compute_policy_loss(
    old_log_probs: Float[Tensor, "*tokens"],
    log_probs: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, "*tokens"],
    clip_low: float,
    clip_high: float,
    clip_c: float,
) -> PolicyLoss:
    """PPO's clipped objective with an asymmetric range (DAPO, arXiv 2503.14476) and dual clip (arXiv 1912.09729).

    Args:
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        clip_c: upper bound (> 1) of the ratio in the loss of tokens with a negative advantage.
    """
    log_ratio = log_probs - old_log_probs
    pessimistic, clipped = _clipped_objective(log_ratio, advantages, clip_low, clip_high)
    bound, negative = -advantages * clip_c, advantages < 0
    loss = torch.where(negative, torch.minimum(pessimistic, bound), pessimistic)
    return PolicyLoss(loss, clipped, negative & (pessimistic > bound), -log_ratio)


def compute_policy_loss_gspo(
    old_log_probs: Float[Tensor, "*tokens"],
    log_probs: Float[Tensor, "*tokens"],
    mean_log_ratio: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, "*tokens"],
    clip_low: float,
    clip_high: float,
) -> PolicyLoss:
    """GSPO (arXiv 2507.18071): one ratio a response, the geometric mean of its tokens', clipped as a whole.

    In the form of its section 4.3: every token has its response's ratio as a value, and its own gradient. Under equal
    advantages in a response the mean over its tokens then has value and gradient of the response's objective, and no
    gradient has to go through a sum over tokens, which may lie on several ranks.

    Args:
        mean_log_ratio: for each token the mean of new less old log-probs over its response, without gradient.
        clip_low, clip_high: the response's ratio is clipped to [1 - clip_low, 1 + clip_high].
    """
    log_ratio = log_probs - log_probs.detach() + mean_log_ratio
    loss, clipped = _clipped_objective(log_ratio, advantages, clip_low, clip_high)
    return PolicyLoss(loss, clipped, torch.zeros_like(clipped), old_log_probs - log_probs)


def compute_policy_loss_cispo(
    old_log_probs: Float[Tensor, "*tokens"],
    log_probs: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, "*tokens"],
    clip_low: float,
    clip_high: float,
) -> PolicyLoss:
    """CISPO (arXiv 2506.13585, section 3.1): the policy gradient of every token, weighed by its clipped ratio, which
    has no gradient of its own. PPO drops the tokens that its clip reaches.

    Args:
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]; from a `clip_low` of 1 on there is
            no lower bound, as in the paper.
    """
    log_ratio = log_probs - old_log_probs
    ratio = log_ratio.detach().clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    weights = ratio.clamp(1 - clip_low, 1 + clip_high)
    clipped = weights != ratio
    return PolicyLoss(-weights * advantages * log_probs, clipped, torch.zeros_like(clipped), -log_ratio)


def _clipped_objective(
    log_ratio: Float[Tensor, "*tokens"], advantages: Float[Tensor, "*tokens"], clip_low: float, clip_high: float
) -> tuple[Float[Tensor, "*tokens"], Bool[Tensor, "*tokens"]]:
    """The worse of the losses under the ratio and under the clipped one, and where that is the latter."""
    ratio = log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(plain, clipped), clipped > plain
