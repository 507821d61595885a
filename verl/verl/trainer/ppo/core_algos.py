"""The algorithms as pure functions: advantages, policy and value loss, loss aggregation, KL estimates and controllers.

B is responses, R response tokens. Losses are sums over local tokens divided by **global** denominators, so that the
values of all micro-batches and ranks add up to the loss of the global mini-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from verl.models.log_probs import masked_sum
from xbai.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32, Float64, Int64, Shaped

    from verl.trainer.config.algorithm import AlgorithmConfig, KLControl

Uids: TypeAlias = 'Sequence[str] | Shaped[np.ndarray, "B"]'
"""[B] the prompt of each response."""


class Groups(NamedTuple):
    """Which responses belong to one prompt, with the statistics of their gradable members.

    In float64: equal rewards less their float32 mean are not quite 0, and their standard deviation is as small.
    """

    of_row: Int64[Tensor, "B"]
    """Group of each response."""
    graded: Bool[Tensor, "B"]
    size: Float64[Tensor, "G"]
    """Gradable responses of each group."""

    @classmethod
    def from_uids(cls, uids: Uids, graded: Shaped[Tensor, "B"]) -> Groups:
        """Group responses by the uid of their prompt."""
        _, inverse = np.unique(np.asarray(uids), return_inverse=True)
        of_row = torch.as_tensor(inverse, device=graded.device).flatten()
        size = torch.zeros(int(of_row.max()) + 1, dtype=torch.float64, device=graded.device)
        size = size.index_add(0, of_row, graded.double())
        return cls(of_row, graded.bool(), size)

    def sum(self, values: Float[Tensor, "B"]) -> Float64[Tensor, "G"]:
        """Of each group, over gradable responses."""
        return torch.zeros_like(self.size).index_add(0, self.of_row, values.double().masked_fill(~self.graded, 0.0))

    def centred(self, values: Float[Tensor, "B"]) -> Float64[Tensor, "B"]:
        """Values less their group's mean; 0 for responses that could not be graded."""
        mean = self.sum(values) / self.size.clamp(min=1)
        return (values.double() - mean[self.of_row]).masked_fill(~self.graded, 0.0)


def compute_grpo_outcome_advantage(
    rewards: Float[Tensor, "B"],
    uids: Uids,
    graded: Shaped[Tensor, "B"],
    norm_by_std: bool = True,
    eps: float = 1e-6,
) -> Float32[Tensor, "B"]:
    """GRPO (arXiv 2402.03300): outcome reward less its prompt's mean, over the standard deviation.

    Args:
        rewards: of the outcomes.
        uids: prompt of each response.
        graded: the others stay out of the statistics and get 0.
        norm_by_std: divide by the (unbiased) standard deviation; false is the form of Dr. GRPO (arXiv 2503.20783).
        eps: added to the standard deviation.

    Returns:
        Advantages; 0 where a prompt has a single gradable response.
    """
    groups = Groups.from_uids(uids, graded)
    centred = groups.centred(rewards)
    if not norm_by_std:
        return centred.float()
    std = (groups.sum(centred.square()) / (groups.size - 1).clamp(min=1)).sqrt()
    return (centred / (std[groups.of_row] + eps)).float()


def compute_rloo_outcome_advantage(
    rewards: Float[Tensor, "B"], uids: Uids, graded: Shaped[Tensor, "B"]
) -> Float32[Tensor, "B"]:
    """RLOO (arXiv 2402.14740): outcome reward less the mean of the prompt's **other** gradable responses."""
    groups = Groups.from_uids(uids, graded)
    size = groups.size[groups.of_row]
    return (groups.centred(rewards) * size / (size - 1).clamp(min=1)).float()


def compute_remax_outcome_advantage(
    rewards: Float[Tensor, "B"], baselines: Float[Tensor, "B"], graded: Shaped[Tensor, "B"]
) -> Float32[Tensor, "B"]:
    """ReMax (arXiv 2310.10505): outcome reward less `baselines`, that of the prompt's greedy response."""
    return (rewards - baselines).float().masked_fill(~graded.bool(), 0.0)


def discounted_returns(
    token_level_rewards: Float[Tensor, "B R"], response_mask: Shaped[Tensor, "B R"], gamma: float
) -> Float32[Tensor, "B R"]:
    """Sum of the rewards from each token on, discounted; right-padded rows, 0 on padding."""
    # Time first: a column of a wide row-major tensor is scattered over memory.
    rewards = (token_level_rewards.float() * response_mask).T.contiguous()
    returns, running = torch.empty_like(rewards), torch.zeros(len(response_mask), device=rewards.device)
    for t in reversed(range(len(rewards))):
        running = torch.add(rewards[t], running, alpha=gamma)
        returns[t] = running
    return returns.T * response_mask


def whiten(
    values: Float[Tensor, "*shape"], mask: Shaped[Tensor, "*shape"], eps: float = 1e-8
) -> Float[Tensor, "*shape"]:
    """`values` with mean 0 and variance 1 over `mask`; 0 off it."""
    count = mask.sum()
    mean = masked_sum(values, mask) / count.clamp(min=1)
    variance = masked_sum((values - mean).square(), mask) / (count - 1).clamp(min=1)
    return ((values - mean) * torch.rsqrt(variance + eps)).masked_fill(~mask.bool(), 0.0)


def compute_reinforce_plus_plus_advantage(
    token_level_rewards: Float[Tensor, "B R"],
    response_mask: Shaped[Tensor, "B R"],
    graded: Shaped[Tensor, "B"],
    gamma: float = 1.0,
) -> tuple[Float32[Tensor, "B R"], Float32[Tensor, "B R"]]:
    """REINFORCE++ (arXiv 2501.03262): discounted returns, whitened over all gradable tokens; advantages, returns."""
    mask = response_mask.bool() & graded.bool()[:, None]
    returns = discounted_returns(token_level_rewards, mask, gamma)
    return whiten(returns, mask), returns


def compute_gae_advantage(
    token_level_rewards: Float[Tensor, "B R"],
    values: Float[Tensor, "B R"],
    response_mask: Shaped[Tensor, "B R"],
    graded: Shaped[Tensor, "B"],
    gamma: float,
    lam: float,
) -> tuple[Float32[Tensor, "B R"], Float32[Tensor, "B R"]]:
    """Generalised advantage estimates (arXiv 1506.02438), whitened over all gradable tokens.

    Args:
        token_level_rewards, values, response_mask: rows right-padded.
        graded: the others get 0, and stay out of the statistics.
        gamma, lam: discount and trace decay.

    Returns:
        Advantages and returns (targets of the critic).
    """
    mask = response_mask.bool() & graded.bool()[:, None]
    values = values.float().masked_fill(~mask, 0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = token_level_rewards.float() * mask + gamma * next_values - values
    advantages = discounted_returns(deltas, mask, gamma * lam)
    return whiten(advantages, mask), advantages + values


class AdvantageInputs(NamedTuple):
    """What the estimators choose from."""

    token_level_rewards: Float[Tensor, "B R"]
    """An outcome reward sits on the last response token."""
    response_mask: Shaped[Tensor, "B R"]
    graded: Shaped[Tensor, "B"]
    uids: Uids
    values: Float[Tensor, "B R"] | None = None
    """For gae."""
    baselines: Float[Tensor, "B"] | None = None
    """Rewards of greedy responses, for remax."""


def _grpo(inputs: AdvantageInputs, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    rewards, norm_by_std = inputs.token_level_rewards.sum(-1), config.norm_adv_by_std_in_grpo
    return _spread(compute_grpo_outcome_advantage(rewards, inputs.uids, inputs.graded, norm_by_std), inputs)


def _rloo(inputs: AdvantageInputs, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    rewards = inputs.token_level_rewards.sum(-1)
    return _spread(compute_rloo_outcome_advantage(rewards, inputs.uids, inputs.graded), inputs)


def _remax(inputs: AdvantageInputs, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    if inputs.baselines is None:
        raise ValueError("adv_estimator=remax needs the rewards of greedy responses")
    rewards = inputs.token_level_rewards.sum(-1)
    return _spread(compute_remax_outcome_advantage(rewards, inputs.baselines, inputs.graded), inputs)


def _reinforce_plus_plus(inputs: AdvantageInputs, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    rewards, mask, graded = inputs.token_level_rewards, inputs.response_mask, inputs.graded
    return compute_reinforce_plus_plus_advantage(rewards, mask, graded, config.gamma)


def _gae(inputs: AdvantageInputs, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    if inputs.values is None:
        raise ValueError("adv_estimator=gae needs the critic's values")
    rewards, mask, graded = inputs.token_level_rewards, inputs.response_mask, inputs.graded
    return compute_gae_advantage(rewards, inputs.values, mask, graded, config.gamma, config.lam)


def _spread(advantages: Float32[Tensor, "B"], inputs: AdvantageInputs) -> tuple[Tensor, Tensor]:
    per_token = advantages[:, None] * inputs.response_mask
    return per_token, per_token


ADVANTAGE_ESTIMATORS: dict[str, Callable[[AdvantageInputs, AlgorithmConfig], tuple[Tensor, Tensor]]] = {
    "grpo": _grpo,
    "rloo": _rloo,
    "remax": _remax,
    "reinforce_plus_plus": _reinforce_plus_plus,
    "gae": _gae,
}


def compute_advantages(inputs: AdvantageInputs, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, R] by `algorithm.adv_estimator`; 0 for responses that could not be graded."""
    return ADVANTAGE_ESTIMATORS[algorithm.adv_estimator](inputs, algorithm)


class PolicyLoss(NamedTuple):
    """Per-token outcome of the clipped objective."""

    loss: Float[Tensor, "*tokens"]
    clipped: Bool[Tensor, "*tokens"]
    """The ratio left the clip range in the direction the advantage pushes."""
    dual_clipped: Bool[Tensor, "*tokens"]
    """The ratio passed `clip_ratio_c` under a negative advantage."""
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
        old_log_probs, log_probs, advantages: of each token, in any shape.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        clip_c: upper bound (> 1) of the ratio in the loss of tokens with a negative advantage.
    """
    log_ratio = log_probs - old_log_probs
    # The clamp only keeps a diverged token finite: an infinite ratio times an advantage of 0 would be nan.
    ratio = log_ratio.clamp(-20, 20).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    pessimistic, bound = torch.maximum(plain, clipped), -advantages * clip_c
    negative = advantages < 0
    loss = torch.where(negative, torch.minimum(pessimistic, bound), pessimistic)
    return PolicyLoss(loss, clipped > plain, negative & (pessimistic > bound), -log_ratio)


def truncated_importance_weights(
    old_log_probs: Float[Tensor, "*tokens"], rollout_log_probs: Float[Tensor, "*tokens"], cap: float
) -> Float[Tensor, "*tokens"]:
    """How much likelier each token is to the actor than to the engine that sampled it, at most `cap`.

    Weighed by them, the policy gradient is that of the actor's own samples, but for the truncation's small bias, where
    the engine computes slightly other probabilities (truncated importance sampling, Yao et al. 2025).
    """
    return (old_log_probs - rollout_log_probs).clamp(-20, 20).exp().clamp(max=cap)


class ValueLoss(NamedTuple):
    """Per-token outcome of the critic's clipped regression."""

    loss: Float[Tensor, "*tokens"]
    clipped: Bool[Tensor, "*tokens"]
    """The bound on the step decided the loss."""


def compute_value_loss(
    values: Float[Tensor, "*tokens"],
    old_values: Float[Tensor, "*tokens"],
    returns: Float[Tensor, "*tokens"],
    clip: float,
) -> ValueLoss:
    """Half the squared error, the worse of that of `values` and of `values` held within `clip` of the old ones (PPO).

    Args:
        values, old_values, returns: of each token; the old values are those that the advantages were made from.
        clip: half width of the range around the old values.
    """
    held = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
    plain, clipped = (values - returns).square(), (held - returns).square()
    return ValueLoss(0.5 * torch.maximum(plain, clipped), clipped > plain)


LOSS_AGG_MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


@dataclass(frozen=True)
class Denominators:
    """Of the global mini-batch: response tokens, and responses with at least one token, that count in the loss."""

    tokens: float
    sequences: float


def token_weights(mask: Bool[Tensor, "B R"], mode: str, denominators: Denominators) -> Float32[Tensor, "B R"]:
    """What each token weighs in the loss: `(token_weights(...) * losses).sum()` is this micro-batch's share of it.

    Args:
        mask: the tokens that count, of whole responses.
        mode: `token-mean`, or the mean over responses of their tokens' sum or mean.
        denominators: of the global mini-batch, with the same mask.

    Returns:
        0 off the mask.

    Raises:
        UserError: unknown mode.
    """
    if mode not in LOSS_AGG_MODES:
        raise UserError(f"actor.loss_agg_mode={mode} is unknown, use one of {', '.join(LOSS_AGG_MODES)}")
    if mode == "token-mean":
        return mask.float() / max(denominators.tokens, 1)
    weights = mask.float() / max(denominators.sequences, 1)
    return weights / mask.sum(-1, keepdim=True).clamp(min=1) if mode == "seq-mean-token-mean" else weights


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": lambda log_ratio: log_ratio,
    "abs": lambda log_ratio: log_ratio.abs(),
    "mse": lambda log_ratio: 0.5 * log_ratio.square(),
    # Both clamps only keep a diverged token finite.
    "low_var_kl": lambda log_ratio: ((-log_ratio).clamp(-20, 20).exp() - 1 + log_ratio.clamp(-20, 20)).clamp(-10, 10),
}
KL_ESTIMATORS |= {"k1": KL_ESTIMATORS["kl"], "k2": KL_ESTIMATORS["mse"], "k3": KL_ESTIMATORS["low_var_kl"]}


KL_LOSS_TYPES = (*KL_ESTIMATORS, *(f"{kind}+" for kind in KL_ESTIMATORS))
"""Of a loss: with `+` (as in public verl) the estimate is that of the name, its gradient that of `mse`."""


def kl_penalty(
    log_probs: Float[Tensor, "*tokens"], ref_log_probs: Float[Tensor, "*tokens"], kind: str
) -> Float[Tensor, "*tokens"]:
    """Per-token estimate of KL(policy, reference) from sampled tokens.

    Args:
        log_probs, ref_log_probs: of each token, in any shape.
        kind: `kl` or `k1`, `abs`, `mse` or `k2`, `low_var_kl` or `k3` (non-negative and unbiased; Schulman 2020).

    Raises:
        UserError: another kind. `full` is no estimate; the joint model computes it, from both models' hidden states.
    """
    if kind not in KL_ESTIMATORS:
        raise UserError(f"KL estimate {kind!r} is not available from log-probs, use one of {', '.join(KL_ESTIMATORS)}")
    return KL_ESTIMATORS[kind](log_probs - ref_log_probs)


def check_kl_loss_type(kind: str) -> None:
    """Raise a `UserError` for the estimate whose gradient is the score function, of expectation 0."""
    if kind in ("kl", "k1"):
        raise UserError(
            f"actor_rollout_ref.actor.kl_loss_type={kind} has no gradient as a loss (on-policy its expectation is 0); "
            f"use low_var_kl, mse or full, or {kind}+ (its value, with the gradient of mse); in the reward, "
            f"algorithm.kl_penalty={kind} is right"
        )


def kl_loss(
    log_probs: Float[Tensor, "*tokens"], ref_log_probs: Float[Tensor, "*tokens"], kind: str
) -> Float[Tensor, "*tokens"]:
    """Per-token KL(policy, reference) to be minimised, from tokens that the policy sampled.

    What the gradient is in expectation, for tokens of the policy as it is: of `mse`, and of all with `+`, the gradient
    of KL(policy, reference); of `low_var_kl` that of KL(reference, policy), the same to first order; of `abs` that of
    the L1 distance.

    Args:
        log_probs, ref_log_probs: of each token; the former with gradient.
        kind: one of `KL_LOSS_TYPES`.

    Raises:
        UserError: `kl` or `k1`, which cannot act as a loss, or another kind.
    """
    check_kl_loss_type(kind)
    value = kl_penalty(log_probs, ref_log_probs, kind.removesuffix("+"))
    if not kind.endswith("+"):
        return value
    gradient = KL_ESTIMATORS["mse"](log_probs - ref_log_probs)
    return value.detach() + (gradient - gradient.detach())


class KLController(Protocol):
    """Gives the coefficient of the KL penalty in the reward."""

    value: float

    def update(self, current_kl: float, n_steps: int) -> None:
        """Take note of the KL measured over `n_steps` responses."""


class FixedKLController:
    """A constant coefficient."""

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, current_kl: float, n_steps: int) -> None:
        """Nothing to adapt."""


class AdaptiveKLController:
    """Moves the coefficient towards a target KL (arXiv 1909.08593, section 2.2)."""

    def __init__(self, kl_coef: float, target_kl: float, horizon: float) -> None:
        self.value = kl_coef
        self._target, self._horizon = target_kl, horizon

    def update(self, current_kl: float, n_steps: int) -> None:
        """Raise the coefficient where `current_kl` is over the target, lower it where under."""
        error = float(np.clip(current_kl / self._target - 1, -0.2, 0.2))
        self.value *= 1 + error * n_steps / self._horizon


def get_kl_controller(kl_ctrl: KLControl) -> KLController:
    """The controller of `algorithm.kl_ctrl`."""
    if kl_ctrl.type == "fixed":
        return FixedKLController(kl_ctrl.kl_coef)
    return AdaptiveKLController(kl_ctrl.kl_coef, kl_ctrl.target_kl, kl_ctrl.horizon)
