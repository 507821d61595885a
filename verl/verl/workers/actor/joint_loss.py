"""The loss of the joint update: policy gradient - entropy + KL to the reference + score loss.

Which steps count in the score loss, and how many there are of each class, follows from the head's evaluation-mode
logits **before** the update (`old_step_logits`), as PPO's ratio refers to the log-probs before it. The published form
asks the head in the middle of the update instead; doing it beforehand makes every denominator known from the data
alone, so that the loss does not depend on how a mini-batch is split over micro-batches and ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from verl.models.joint_model import JointOutput, computed
from verl.models.packing import Batch, TokenLayout
from verl.trainer.config.policy import ActorRolloutRefConfig
from verl.trainer.ppo.core_algos import (
    Denominators,
    compute_policy_loss,
    kl_loss,
    token_weights,
    truncated_importance_weights,
)
from verl.workers.update import Loss, LossOutput, loss_mask
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
    def from_config(cls, config: ActorRolloutRefConfig) -> LossConfig:
        """`clip_ratio` stands in where a side of its own is null."""
        actor, score = config.actor, config.score
        return cls(
            clip_low=actor.clip_ratio if actor.clip_ratio_low is None else actor.clip_ratio_low,
            clip_high=actor.clip_ratio if actor.clip_ratio_high is None else actor.clip_ratio_high,
            clip_c=actor.clip_ratio_c,
            agg_mode=actor.loss_agg_mode,
            entropy_coeff=actor.entropy_coeff,
            use_kl_loss=actor.use_kl_loss,
            kl_loss_coef=actor.kl_loss_coef,
            kl_loss_type=actor.kl_loss_type,
            tis_imp_ratio_cap=actor.tis_imp_ratio_cap,
            use_score=config.use_score,
            score_loss_coef=score.loss_coef,
            backbone_grad_scale=score.backbone_grad_scale,
            score=score.objective,
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


class JointLoss(Loss[JointOutput, Totals]):
    """Policy gradient, entropy, KL and score loss.

    Its micro-batches have the columns of `LossConfig.batch_keys`. Without `old_log_probs` the policy has not moved
    since it sampled, and its own output has them.

    Args:
        config: coefficients and switches.
    """

    metric = "actor/loss"

    def __init__(self, config: LossConfig) -> None:
        self.config = config

    def local_totals(self, batch: Batch) -> Tensor:
        """[7] float64: what counts of `batch`, tokens and responses, and in the score loss."""
        mask = loss_mask(batch)
        policy, score = torch.stack([mask.sum(), mask.any(-1).sum()]), torch.zeros(ScoreTotals.SIZE)
        if self.config.use_score:
            score = self.config.score.local_totals(
                self._steps_that_count(batch),
                batch["step_feature_mask"].bool(),
                batch["correct"],
                batch["graded"],
                batch.get("rival_scores"),
            )
        return torch.cat([policy.double(), score.to(policy.device).double()])

    def totals(self, sums: Tensor) -> Totals:
        """From the sum of `local_totals` over all ranks."""
        return Totals(Denominators(*sums[:2].tolist()), ScoreTotals.from_tensor(sums[2:]))

    def counts(self, totals: Totals) -> dict[str, float]:
        """Steps, and pairs where responses are compared, that counted in the score loss."""
        if not self.config.use_score:
            return {}
        steps = totals.score.steps
        counted = {"score/counted_right": steps.positive, "score/counted_wrong": steps.negative}
        return counted | ({"score/counted_pairs": totals.score.pairs} if self.config.score.compares else {})

    def __call__(self, output: JointOutput, layout: TokenLayout, batch: Batch, totals: Totals) -> LossOutput:
        """One micro-batch's share."""
        config, weights = self.config, _TokenWeights.of(batch, layout, totals.denominators, self.config.agg_mode)
        loss, metrics = self._policy_gradient(output, layout, batch, weights)
        if config.entropy_coeff != 0:
            metrics["actor/entropy_loss"] = (weights.of_loss * computed(output.entropy)).sum()
            loss = loss - config.entropy_coeff * metrics["actor/entropy_loss"]
        if config.use_kl_loss:
            if config.uses_full_kl:
                kl = computed(output.kl)
            else:
                kl = kl_loss(output.log_probs, layout.tokens(batch["ref_log_prob"]), config.kl_loss_type)
            metrics["actor/kl_loss"] = (weights.of_loss * kl).sum()
            loss = loss + config.kl_loss_coef * metrics["actor/kl_loss"]
        if config.use_score:
            metrics["score/loss"] = self._score_loss(computed(output.step_logits), layout, batch, totals.score)
            loss = loss + config.score_loss_coef * metrics["score/loss"]
        metrics[self.metric] = loss
        return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})

    def _policy_gradient(
        self, output: JointOutput, layout: TokenLayout, batch: Batch, weights: _TokenWeights
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, is_on_policy, advantages = self.config, "old_log_probs" not in batch, layout.tokens(batch["advantages"])
        old_log_probs = output.log_probs.detach() if is_on_policy else layout.tokens(batch["old_log_probs"])
        policy = compute_policy_loss(
            old_log_probs, output.log_probs, advantages, config.clip_low, config.clip_high, config.clip_c
        )
        losses = policy.loss
        if (cap := config.tis_imp_ratio_cap) is not None:
            rollout_log_probs = layout.tokens(batch["rollout_log_probs"])
            losses = losses * truncated_importance_weights(old_log_probs, rollout_log_probs, cap)
        loss = (weights.of_loss * losses).sum()
        metrics = {
            "actor/pg_loss": loss,
            "actor/pg_clipfrac": (weights.of_mean * policy.clipped).sum(),
            "actor/pg_clipfrac_lower": (weights.of_mean * policy.dual_clipped).sum(),
            "actor/ppo_kl": (weights.of_mean * policy.approx_kl).sum(),
        }
        if is_on_policy:
            log_ratio = old_log_probs - layout.tokens(batch["rollout_log_probs"])
            metrics["rollout/log_prob_diff_mean"] = (weights.of_mean * log_ratio.abs()).sum()
            metrics["rollout/mismatch_kl"] = (weights.of_mean * (log_ratio.expm1() - log_ratio)).sum()
        return loss, metrics

    def _score_loss(self, step_logits: Tensor, layout: TokenLayout, batch: Batch, totals: ScoreTotals) -> Tensor:
        objective, loss = self.config.score, step_logits.new_zeros(())
        if objective.judges_steps:
            counted, labels = layout.steps(self._steps_that_count(batch)), layout.steps(batch["correct"][:, None])
            # To the loss of the head a flat step is a trajectory of one.
            loss = sprm_loss(step_logits[:, None], counted[:, None], labels, totals.steps, objective.class_balance)
        if objective.judges_responses:
            whole = layout.gather_steps(step_logits)
            names = ("step_feature_mask", "correct", "graded", "rival_scores")
            columns = {name: batch[name].to(whole.device, non_blocking=True) for name in names if name in batch}
            features, rivals = columns["step_feature_mask"].bool(), columns.get("rival_scores")
            of_responses = objective.response_loss(
                whole, features, columns["correct"], columns["graded"], rivals, totals
            )
            loss = loss + of_responses / layout.ranks
        return loss

    def _steps_that_count(self, batch: Batch) -> Tensor:
        """[B, T] bool: the steps with w_n = 1, by the logits before the update."""
        features = batch["step_feature_mask"].bool()
        return self.config.score.counted_steps(batch["old_step_logits"], features, batch["correct"], batch["graded"])


class _TokenWeights(NamedTuple):
    """What each response token weighs, [M]."""

    of_loss: Tensor
    """In the loss, by `loss_agg_mode`."""
    of_mean: Tensor
    """In a mean over tokens."""

    @classmethod
    def of(cls, batch: Batch, layout: TokenLayout, denominators: Denominators, agg_mode: str) -> _TokenWeights:
        mask = loss_mask(batch)
        return cls(*(layout.tokens(token_weights(mask, mode, denominators)) for mode in (agg_mode, "token-mean")))
