"""The algorithms as pure functions: advantages, value loss, loss aggregation, KL estimates and controllers.

B is responses, R response tokens. Losses are sums over local tokens divided by **global** denominators, so that the
values of all micro-batches and ranks add up to the loss of the global mini-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from verl.models.log_probs import masked_sum

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32, Float64, Int64, Shaped

    from verl.trainer.config.schema import AlgorithmConfig, KLControl, LossAggMode

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
    rewards: Float[Tensor, "B"], uids: Uids, graded: Shaped[Tensor, "B"], norm_by_std: bool = True, eps: float = 1e-6
) -> Float32[Tensor, "B"]:
    """GRPO (arXiv 2402.03300): outcome reward less its prompt's mean, over the standard deviation.

    Args:
        rewards, uids, graded: those that are not graded stay out of the statistics and get 0.
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
    """Generalised advantage estimates (arXiv 1506.02438), whitened over all gradable tokens; advantages, and returns
    (targets of the critic).

    Rows are right-padded; those that are not graded get 0, and stay out of the statistics.
    """
    mask = response_mask.bool() & graded.bool()[:, None]
    values = values.float().masked_fill(~mask, 0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = token_level_rewards.float() * mask + gamma * next_values - values
    advantages = discounted_returns(deltas, mask, gamma * lam)
    return whiten(advantages, mask), advantages + values


def compute_advantages(
    columns: Mapping[str, Tensor], uids: Uids, algorithm: AlgorithmConfig
) -> tuple[Float32[Tensor, "B R"], Float32[Tensor, "B R"]]:
    """Advantages and returns by `algorithm.adv_estimator`; 0 for responses that could not be graded.

    `columns` has `token_level_rewards`, where an outcome reward sits on the last response token, `response_mask` [B, R]
    and `graded` [B]; for gae `values` [B, R], for remax `baselines` [B], the rewards of greedy responses.
    """
    rewards, mask, graded = (columns[name] for name in ("token_level_rewards", "response_mask", "graded"))
    match algorithm.adv_estimator:
        case "gae":
            return compute_gae_advantage(rewards, columns["values"], mask, graded, algorithm.gamma, algorithm.lam)
        case "reinforce_plus_plus":
            return compute_reinforce_plus_plus_advantage(rewards, mask, graded, algorithm.gamma)
        case "grpo":
            by_std = algorithm.norm_adv_by_std_in_grpo
            of_response = compute_grpo_outcome_advantage(rewards.sum(-1), uids, graded, by_std)
        case "rloo":
            of_response = compute_rloo_outcome_advantage(rewards.sum(-1), uids, graded)
        case "remax":
            of_response = compute_remax_outcome_advantage(rewards.sum(-1), columns["baselines"], graded)
    per_token = of_response[:, None] * mask
    return per_token, per_token


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
    """Half the squared error, the worse of that of `values` and of `values` held within `clip` of the old ones (PPO),
    which the advantages were made from."""
    held = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
    plain, clipped = (values - returns).square(), (held - returns).square()
    return ValueLoss(0.5 * torch.maximum(plain, clipped), clipped > plain)


@dataclass(frozen=True)
class Denominators:
    """Of the global mini-batch: response tokens, and responses with at least one token, that count in the loss."""

    tokens: float
    sequences: float


def token_weights(
    mask: Bool[Tensor, "B R"], mode: LossAggMode, denominators: Denominators, max_length: int = 1
) -> Float32[Tensor, "B R"]:
    """What each token weighs in the loss: `(token_weights(...) * losses).sum()` is this micro-batch's share of it.

    Args:
        mask: the tokens that count, of whole responses.
        mode: `token-mean`, or the mean over responses of their tokens' sum or mean, or of that sum over a constant
            (`seq-mean-token-sum-norm`, Dr. GRPO, arXiv 2503.20783).
        denominators: of the global mini-batch, with the same mask.
        max_length: that constant.

    Returns:
        0 off the mask.
    """
    if mode == "token-mean":
        return mask.float() / max(denominators.tokens, 1)
    weights = mask.float() / max(denominators.sequences, 1)
    match mode:
        case "seq-mean-token-mean":
            return weights / mask.sum(-1, keepdim=True).clamp(min=1)
        case "seq-mean-token-sum-norm":
            return weights / max_length
    return weights


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": lambda log_ratio: log_ratio,
    "abs": lambda log_ratio: log_ratio.abs(),
    "mse": lambda log_ratio: 0.5 * log_ratio.square(),
    # Both clamps only keep a diverged token finite.
    "low_var_kl": lambda log_ratio: ((-log_ratio).clamp(-20, 20).exp() - 1 + log_ratio.clamp(-20, 20)).clamp(-10, 10),
}
KL_ESTIMATORS |= {"k1": KL_ESTIMATORS["kl"], "k2": KL_ESTIMATORS["mse"], "k3": KL_ESTIMATORS["low_var_kl"]}


def kl_penalty(
    log_probs: Float[Tensor, "*tokens"], ref_log_probs: Float[Tensor, "*tokens"], kind: str
) -> Float[Tensor, "*tokens"]:
    """Per-token estimate of KL(policy, reference) from sampled tokens.

    Args:
        kind: `kl` or `k1`, `abs`, `mse` or `k2`, `low_var_kl` or `k3` (non-negative and unbiased; Schulman 2020);
            `full` is no estimate, the joint model computes it, from both models' hidden states.
    """
    return KL_ESTIMATORS[kind](log_probs - ref_log_probs)


def kl_loss(
    log_probs: Float[Tensor, "*tokens"], ref_log_probs: Float[Tensor, "*tokens"], kind: str
) -> Float[Tensor, "*tokens"]:
    """Per-token KL(policy, reference) to be minimised, from tokens that the policy sampled.

    What the gradient is in expectation, for tokens of the policy as it is: of `mse`, and of all with `+`, the gradient
    of KL(policy, reference); of `low_var_kl` that of KL(reference, policy), the same to first order; of `abs` that of
    the L1 distance.

    Args:
        log_probs, ref_log_probs: the former with gradient.
        kind: as of `kl_penalty`, or with `+` (as in public verl) for its value with the gradient of `mse`; `kl` and
            `k1` have no gradient in expectation, the configuration refuses them.
    """
    value = kl_penalty(log_probs, ref_log_probs, kind.removesuffix("+"))
    if not kind.endswith("+"):
        return value
    gradient = KL_ESTIMATORS["mse"](log_probs - ref_log_probs)
    return value.detach() + (gradient - gradient.detach())


class KLController:
    """The coefficient (`value`) of the KL penalty in the reward: constant, or, where it `adapts`, moved towards a
    target KL (arXiv 1909.08593, section 2.2)."""

    def __init__(self, config: KLControl) -> None:
        self.value, self.adapts = config.kl_coef, config.type == "adaptive"
        self._target, self._horizon = config.target_kl, config.horizon

    def update(self, current_kl: float, n_steps: int) -> None:
        """Raise the coefficient where the KL (of `n_steps` responses) is over the target, lower it where under."""
        if self.adapts:
            error = float(np.clip(current_kl / self._target - 1, -0.2, 0.2))
            self.value *= 1 + error * n_steps / self._horizon
