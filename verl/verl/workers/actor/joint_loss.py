"""The loss of the joint update: policy gradient - entropy + KL to the reference + score loss.

Which steps count in the score loss, and how many there are of each class, follows from the head's evaluation-mode
logits **before** the update (`old_step_logits`), as PPO's ratio refers to the log-probs before it. The published form
asks the head in the middle of the update instead; doing it beforehand makes every denominator known from the data
alone, so that the loss does not depend on how a mini-batch is split over micro-batches and ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verl.models.joint_model import JointOutput, computed
from verl.models.packing import Batch, TokenLayout
from verl.trainer.config.schema import ActorRolloutRefConfig
from verl.trainer.ppo.core_algos import Denominators, kl_loss, token_weights
from verl.trainer.ppo.policy_losses import (
    PolicyLoss,
    compute_policy_loss,
    compute_policy_loss_cispo,
    compute_policy_loss_gspo,
)
from verl.workers.update import Loss, LossOutput, loss_mask
from xbai.sprm import ScoreObjective, ScoreTotals, sprm_loss


@dataclass(frozen=True)
class Totals:
    """What the loss of the global mini-batch is divided by."""

    denominators: Denominators
    score: ScoreTotals


class JointLoss(Loss[JointOutput, Totals]):
    """Policy gradient, entropy, KL and score loss.

    Its micro-batches have the columns of `batch_keys`. Without `old_log_probs` the policy has not moved since it
    sampled, and its own output has them.

    Args:
        config: the `actor_rollout_ref` section; `actor.clip_ratio` stands in where a side of its own is null.

    Attributes:
        score: what the score head is asked; None without one.
    """

    metric = "actor/loss"

    def __init__(self, config: ActorRolloutRefConfig) -> None:
        self._actor, self._score_section = config.actor, config.score
        self._max_response_length = config.rollout.response_length
        self.score: ScoreObjective | None = config.score.objective if config.use_score else None

    @property
    def uses_full_kl(self) -> bool:
        """The KL is summed over the vocabulary, from the reference's hidden states rather than its log-probs."""
        return self._actor.use_kl_loss and self._actor.kl_loss_type == "full"

    def batch_keys(self, has_old_log_probs: bool = True) -> list[str]:
        """The tensors that the update needs (`add_policy_columns` makes those that depend on the policy loss); without
        `old_log_probs` it compares with its own and the engine's."""
        keys = ["input_ids", "attention_mask", "position_ids", "response_mask", "advantages", "graded"]
        if has_old_log_probs:
            keys.append("old_log_probs")
        else:
            keys.append("rollout_log_probs")
        if self._actor.use_kl_loss and not self.uses_full_kl:
            keys.append("ref_log_prob")
        if self._actor.importance_sampling is not None:
            keys.append("importance_weights")
        if self._actor.leaves_responses_out:
            keys.append("in_policy_loss")
        if self.score is not None:
            keys += ["correct", "step_feature_mask", "old_step_logits"]
            if self.score.compares:
                keys.append("rival_scores")
        return keys

    def local_totals(self, batch: Batch) -> Tensor:
        """[7] float64: what counts of `batch`, tokens and responses, and in the score loss."""
        mask = self._policy_mask(batch)
        policy, score = torch.stack([mask.sum(), mask.any(-1).sum()]), torch.zeros(ScoreTotals.SIZE)
        if self.score is not None:
            score = self.score.local_totals(
                _steps_that_count(batch, self.score),
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
        if self.score is None:
            return {}
        steps = totals.score.steps
        counted = {"score/counted_right": steps.positive, "score/counted_wrong": steps.negative}
        return counted | ({"score/counted_pairs": totals.score.pairs} if self.score.compares else {})

    def __call__(self, output: JointOutput, layout: TokenLayout, batch: Batch, totals: Totals) -> LossOutput:
        """One micro-batch's share."""
        config, mask, denominators = self._actor, self._policy_mask(batch), totals.denominators
        weights = token_weights(mask, config.aggregation, denominators, self._max_response_length)
        of_loss, of_mean = layout.tokens(weights), layout.tokens(token_weights(mask, "token-mean", denominators))
        loss, metrics = self._policy_gradient(output, layout, batch, of_loss, of_mean)
        if config.entropy_coeff != 0:
            metrics["actor/entropy_loss"] = (of_loss * computed(output.entropy)).sum()
            loss = loss - config.entropy_coeff * metrics["actor/entropy_loss"]
        if config.use_kl_loss:
            if self.uses_full_kl:
                kl = computed(output.kl)
            else:
                kl = kl_loss(output.log_probs, layout.tokens(batch["ref_log_prob"]), config.kl_loss_type)
            metrics["actor/kl_loss"] = (of_loss * kl).sum()
            loss = loss + config.kl_loss_coef * metrics["actor/kl_loss"]
        if self.score is not None:
            step_logits = computed(output.step_logits)
            metrics["score/loss"] = _score_loss(self.score, step_logits, layout, batch, totals.score)
            loss = loss + self._score_section.loss_coef * metrics["score/loss"]
        metrics[self.metric] = loss
        return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})

    def _policy_mask(self, batch: Batch) -> Tensor:
        """[B, R] bool: the tokens that the policy learns from."""
        mask = loss_mask(batch)
        return mask & batch["in_policy_loss"][:, None] if self._actor.leaves_responses_out else mask

    def _policy_gradient(
        self, output: JointOutput, layout: TokenLayout, batch: Batch, of_loss: Tensor, of_mean: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Share and metrics, by what each token [M] weighs in the loss, and in a mean over tokens."""
        is_on_policy = "old_log_probs" not in batch
        old_log_probs = output.log_probs.detach() if is_on_policy else layout.tokens(batch["old_log_probs"])
        policy = self._policy_loss(old_log_probs, output.log_probs, layout, batch)
        losses = policy.loss
        if self._actor.importance_sampling is not None:
            losses = losses * layout.tokens(batch["importance_weights"])
        loss = (of_loss * losses).sum()
        metrics = {
            "actor/pg_loss": loss,
            "actor/pg_clipfrac": (of_mean * policy.clipped).sum(),
            "actor/pg_clipfrac_lower": (of_mean * policy.dual_clipped).sum(),
            "actor/ppo_kl": (of_mean * policy.approx_kl).sum(),
        }
        if is_on_policy:
            log_ratio = old_log_probs - layout.tokens(batch["rollout_log_probs"])
            metrics["rollout/log_prob_diff_mean"] = (of_mean * log_ratio.abs()).sum()
            metrics["rollout/mismatch_kl"] = (of_mean * (log_ratio.expm1() - log_ratio)).sum()
        return loss, metrics

    def _policy_loss(self, old_log_probs: Tensor, log_probs: Tensor, layout: TokenLayout, batch: Batch) -> PolicyLoss:
        """Of each token [M], by `actor.loss`."""
        config, advantages = self._actor, layout.tokens(batch["advantages"])
        low, high = (
            config.clip_ratio if side is None else side for side in (config.clip_ratio_low, config.clip_ratio_high)
        )
        match config.loss:
            case "gspo":
                mean = _mean_of_response(log_probs - old_log_probs, layout, batch)
                return compute_policy_loss_gspo(old_log_probs, log_probs, mean, advantages, low, high)
            case "cispo":
                return compute_policy_loss_cispo(old_log_probs, log_probs, advantages, low, high)
        return compute_policy_loss(old_log_probs, log_probs, advantages, low, high, config.clip_ratio_c)


def _mean_of_response(values: Tensor, layout: TokenLayout, batch: Batch) -> Tensor:
    """[M] for each token the mean of `values` [M] over its response, whichever ranks hold it; without gradient. A
    collective of the ranks that share the rows."""
    whole = layout.restore_tokens(values)
    tokens = batch["response_mask"].sum(-1, keepdim=True).clamp(min=1).to(whole.device)
    return layout.tokens(whole.sum(-1, keepdim=True) / tokens)


def _score_loss(
    objective: ScoreObjective, step_logits: Tensor, layout: TokenLayout, batch: Batch, totals: ScoreTotals
) -> Tensor:
    loss = step_logits.new_zeros(())
    if objective.judges_steps:
        counted, labels = layout.steps(_steps_that_count(batch, objective)), layout.steps(batch["correct"][:, None])
        # To the loss of the head a flat step is a trajectory of one.
        loss = sprm_loss(step_logits[:, None], counted[:, None], labels, totals.steps, objective.class_balance)
    if objective.judges_responses:
        whole = layout.gather_steps(step_logits)
        names = ("step_feature_mask", "correct", "graded", "rival_scores")
        columns = {name: batch[name].to(whole.device, non_blocking=True) for name in names if name in batch}
        features, rivals = columns["step_feature_mask"].bool(), columns.get("rival_scores")
        of_responses = objective.response_loss(whole, features, columns["correct"], columns["graded"], rivals, totals)
        loss = loss + of_responses / layout.ranks
    return loss


def _steps_that_count(batch: Batch, objective: ScoreObjective) -> Tensor:
    """[B, T] bool: the steps with w_n = 1, by the logits before the update."""
    features = batch["step_feature_mask"].bool()
    return objective.counted_steps(batch["old_step_logits"], features, batch["correct"], batch["graded"])
