"""The loss of the joint update: policy gradient - entropy + KL to the reference + score loss.

Which steps count in the score loss, and how many there are of each class, follows from the head's evaluation-mode
logits **before** the update (`old_step_logits`), as PPO's ratio refers to the log-probs before it. The published form
asks the head in the middle of the update instead; doing it beforehand makes every denominator known from the data
alone, so that the loss does not depend on how a mini-batch is split over micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from verl.trainer.ppo.core_algos import (
    Denominators,
    compute_policy_loss,
    kl_loss,
    token_weights,
    truncated_importance_weights,
)
from verl.utils.packing import Batch, TokenLayout
from verl.workers.actor.joint_model import JointOutput
from xbai.sprm import ScoreObjective, ScoreTotals, sprm_loss


@dataclass(frozen=True)
class LossConfig:
    """The loss's part of `actor_rollout_ref`, resolved."""

    clip_low: float
    clip_high: float
    clip_c: float
    agg_mode: str
    entropy_coeff: float
    use_kl_loss: bool
    kl_loss_coef: float
    kl_loss_type: str
    tis_imp_ratio_cap: float | None
    use_score: bool
    score_loss_coef: float
    backbone_grad_scale: float
    score: ScoreObjective

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LossConfig:
        """Read `actor.*`, `use_score` and `score.*`; `clip_ratio` stands in where a side of its own is null."""
        actor, score = config["actor"], config.get("score") or {}
        clip_low, clip_high = actor.get("clip_ratio_low"), actor.get("clip_ratio_high")
        return cls(
            clip_low=actor["clip_ratio"] if clip_low is None else clip_low,
            clip_high=actor["clip_ratio"] if clip_high is None else clip_high,
            clip_c=actor.get("clip_ratio_c", 3.0),
            agg_mode=actor.get("loss_agg_mode", "token-mean"),
            entropy_coeff=actor.get("entropy_coeff", 0.0),
            use_kl_loss=actor.get("use_kl_loss", False),
            kl_loss_coef=actor.get("kl_loss_coef", 0.0),
            kl_loss_type=actor.get("kl_loss_type", "low_var_kl"),
            tis_imp_ratio_cap=actor.get("tis_imp_ratio_cap"),
            use_score=config.get("use_score", False),
            score_loss_coef=score.get("loss_coef", 1.0),
            backbone_grad_scale=score.get("backbone_grad_scale", 1e-4),
            score=ScoreObjective.from_config(score),
        )

    @property
    def uses_full_kl(self) -> bool:
        """The KL is summed over the vocabulary, from the reference's hidden states rather than its log-probs."""
        return self.use_kl_loss and self.kl_loss_type == "full"

    def batch_keys(self, has_old_log_probs: bool = True) -> list[str]:
        """The tensors that the update needs; without `old_log_probs` it compares with its own and the engine's."""
        keys = ["input_ids", "attention_mask", "position_ids", "response_mask", "advantages", "graded"]
        if has_old_log_probs:
            keys.append("old_log_probs")
        if self.use_kl_loss and not self.uses_full_kl:
            keys.append("ref_log_prob")
        if self.tis_imp_ratio_cap is not None or not has_old_log_probs:
            keys.append("rollout_log_probs")
        if self.use_score:
            keys += ["correct", "step_feature_mask", "old_step_logits"]
            if self.score.compares:
                keys.append("rival_scores")
        return keys


@dataclass(frozen=True)
class Totals:
    """What the loss of the global mini-batch is divided by."""

    denominators: Denominators
    score: ScoreTotals

    @classmethod
    def from_tensor(cls, totals: Tensor) -> Totals:
        """From the sum of `local_totals` over ranks."""
        return cls(Denominators(*totals[:2].tolist()), ScoreTotals.from_tensor(totals[2:]))


def loss_mask(batch: Batch) -> Tensor:
    """[B, R] bool: response tokens of the trajectories that could be graded."""
    return batch["response_mask"].bool() & batch["graded"].bool()[:, None]


def steps_that_count(batch: Batch, config: LossConfig) -> Tensor:
    """[B, T] bool: the steps with w_n = 1, by the logits before the update."""
    features = batch["step_feature_mask"].bool()
    return config.score.counted_steps(batch["old_step_logits"], features, batch["correct"], batch["graded"])


def local_totals(batch: Batch, config: LossConfig) -> Tensor:
    """[7] float64: what counts of this rank, tokens and responses, and in the score loss; to be summed over ranks."""
    mask = loss_mask(batch)
    policy, score = torch.stack([mask.sum(), mask.any(-1).sum()]), torch.zeros(ScoreTotals.SIZE)
    if config.use_score:
        columns = (batch[name] for name in ("correct", "graded"))
        features, rivals = batch["step_feature_mask"].bool(), batch.get("rival_scores")
        score = config.score.local_totals(steps_that_count(batch, config), features, *columns, rivals)
    return torch.cat([policy.double(), score.to(policy.device).double()])


def joint_loss(
    output: JointOutput, layout: TokenLayout, batch: Batch, totals: Totals, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-batch's share of the loss.

    Args:
        output: of the joint model on `layout`.
        layout: of `batch`.
        batch: a micro-batch with the keys of `LossConfig.batch_keys`. Without `old_log_probs` the policy has not moved
            since it sampled, and `output` has them.
        totals: of the global mini-batch.
        config: coefficients and switches.

    Returns:
        Scalar loss, and detached scalar metrics; all are shares, which add up over micro-batches and ranks.
    """
    mask, denominators = loss_mask(batch), totals.denominators
    weights = layout.tokens(token_weights(mask, config.agg_mode, denominators))
    mean_weights = layout.tokens(token_weights(mask, "token-mean", denominators))
    is_on_policy, advantages = "old_log_probs" not in batch, layout.tokens(batch["advantages"])
    old_log_probs = output.log_probs.detach() if is_on_policy else layout.tokens(batch["old_log_probs"])
    policy = compute_policy_loss(
        old_log_probs, output.log_probs, advantages, config.clip_low, config.clip_high, config.clip_c
    )
    pg_losses = policy.loss
    if config.tis_imp_ratio_cap is not None:
        rollout_log_probs = layout.tokens(batch["rollout_log_probs"])
        pg_losses = pg_losses * truncated_importance_weights(old_log_probs, rollout_log_probs, config.tis_imp_ratio_cap)
    loss = pg_loss = (weights * pg_losses).sum()
    metrics = {
        "pg_loss": pg_loss,
        "pg_clipfrac": (mean_weights * policy.clipped).sum(),
        "pg_clipfrac_lower": (mean_weights * policy.dual_clipped).sum(),
        "ppo_kl": (mean_weights * policy.approx_kl).sum(),
    }
    if is_on_policy:
        log_ratio = old_log_probs - layout.tokens(batch["rollout_log_probs"])
        metrics["log_prob_diff_mean"] = (mean_weights * log_ratio.abs()).sum()
        metrics["mismatch_kl"] = (mean_weights * (log_ratio.expm1() - log_ratio)).sum()
    if config.entropy_coeff != 0:
        metrics["entropy_loss"] = (weights * output.entropy).sum()
        loss = loss - config.entropy_coeff * metrics["entropy_loss"]
    if config.use_kl_loss:
        kl = output.kl
        if not config.uses_full_kl:
            kl = kl_loss(output.log_probs, layout.tokens(batch["ref_log_prob"]), config.kl_loss_type)
        metrics["kl_loss"] = (weights * kl).sum()
        loss = loss + config.kl_loss_coef * metrics["kl_loss"]
    if config.use_score:
        metrics["score_loss"] = _score_loss(output.step_logits, layout, batch, totals.score, config)
        loss = loss + config.score_loss_coef * metrics["score_loss"]
    metrics["loss"] = loss
    return loss, {name: value.detach() for name, value in metrics.items()}


def _score_loss(
    step_logits: Tensor, layout: TokenLayout, batch: Batch, totals: ScoreTotals, config: LossConfig
) -> Tensor:
    objective, loss = config.score, step_logits.new_zeros(())
    if objective.judges_steps:
        counted, labels = layout.steps(steps_that_count(batch, config)), layout.steps(batch["correct"][:, None])
        # To the loss of the head a flat step is a trajectory of one.
        loss = sprm_loss(step_logits[:, None], counted[:, None], labels, totals.steps, objective.class_balance)
    if objective.judges_responses:
        whole = layout.gather_steps(step_logits)
        names = ("step_feature_mask", "correct", "graded", "rival_scores")
        columns = [batch[name].to(whole.device, non_blocking=True) if name in batch else None for name in names]
        features, *rest = columns
        loss = loss + objective.response_loss(whole, features.bool(), *rest, totals) / layout.ranks
    return loss
