"""What the responses of a batch are worth: rewards, baselines, advantages, as functions that add columns to it."""

from __future__ import annotations

from verl.protocol import DataProto
from verl.trainer.config.algorithm import AlgorithmConfig
from verl.trainer.ppo.core_algos import AdvantageInputs, KLController, compute_advantages, kl_penalty
from verl.trainer.ppo.metrics import masked_mean
from verl.workers.reward_manager import Reward
from xbai.sprm import ScoreObjective

Metrics = dict[str, float]


def add_reward(batch: DataProto, reward: Reward, algorithm: AlgorithmConfig, kl_controller: KLController) -> Metrics:
    """Add scores, outcome and `token_level_rewards`: the scores, less the KL penalty with `use_kl_in_reward`.

    Args:
        batch: for the penalty with `ref_kl`, or `old_log_probs` and `ref_log_prob`.
        reward: of its responses.
        algorithm: the section.
        kl_controller: has the penalty's coefficient, and sees the KL.
    """
    scores, graded = reward.reward_tensor, reward.graded
    batch.union(DataProto.from_dict({"token_level_scores": scores, "correct": reward.correct, "graded": graded}))
    columns, mask = batch.batch, batch.batch["response_mask"]
    columns["token_level_rewards"] = scores
    if not algorithm.use_kl_in_reward:
        return {}
    if algorithm.kl_penalty == "full":
        kl = columns["ref_kl"]
    else:
        kl = kl_penalty(columns["old_log_probs"], columns["ref_log_prob"], algorithm.kl_penalty) * mask
    metrics = {"reward/kl": masked_mean(kl, mask), "reward/kl_coef": kl_controller.value}
    columns["token_level_rewards"] = scores - kl_controller.value * kl
    kl_controller.update(metrics["reward/kl"], n_steps=len(batch))
    return metrics


def add_baseline(batch: DataProto, baseline: Reward) -> Metrics:
    """Give each response its prompt's greedy reward; one that could not be graded is no baseline, nor is it zero: it
    masks the prompt's responses, which lie next to each other."""
    columns, rewards, graded = batch.batch, baseline.reward_tensor.sum(-1), baseline.graded
    n = len(batch) // len(rewards)
    columns["baselines"] = rewards.repeat_interleave(n)
    columns["graded"] = columns["graded"] & graded.repeat_interleave(n)
    return {"reward/baseline": masked_mean(rewards, graded), "reward/ungraded_baselines": float((~graded).sum())}


def add_advantages(batch: DataProto, algorithm: AlgorithmConfig) -> None:
    """Add `advantages` and `returns` [B, R] by `algorithm.adv_estimator`."""
    columns = batch.batch
    inputs = AdvantageInputs(
        columns["token_level_rewards"],
        columns["response_mask"],
        columns["graded"],
        batch.non_tensor_batch["uid"],
        columns.get("values"),
        columns.get("baselines"),
    )
    columns["advantages"], columns["returns"] = compute_advantages(inputs, algorithm)


def add_rivals(batch: DataProto, objective: ScoreObjective) -> None:
    """Give each response its rivals' scores, where the responses to a prompt are together."""
    columns, prompts = batch.batch, batch.non_tensor_batch["uid"]
    columns["rival_scores"] = objective.rivals(
        columns["old_step_logits"], columns["step_feature_mask"], columns["correct"], columns["graded"], prompts
    )
