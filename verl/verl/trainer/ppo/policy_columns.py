"""What the policy loss asks of a batch besides advantages: what weighs what, and which responses take part."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor

from verl.trainer.config.schema import ActorConfig
from verl.trainer.ppo.metrics import is_truncated, masked_mean
from verl.trainer.ppo.off_policy import ImportanceSampling, effective_sample_size, geometric_mean_ratios


def add_policy_columns(
    columns: MutableMapping[str, Tensor], actor: ActorConfig, end_token_ids: Sequence[int]
) -> dict[str, float]:
    """Add `importance_weights` [B, R] or [B, 1] where `actor` asks for them, and `in_policy_loss` [B] where it may
    leave responses out.

    Args:
        columns: of a graded batch, with the log-probs before the update where there is a correction.
        actor: the section.
        end_token_ids: those that responses end with.

    Returns:
        Metrics of both.
    """
    mask = columns["response_mask"].bool()
    metrics: dict[str, float] = {}
    takes_part = torch.ones(len(mask), dtype=torch.bool)
    if actor.mask_truncated_responses:
        takes_part &= ~is_truncated(columns["responses"], mask, end_token_ids)
    if (bound := actor.rollout_rs_geo_threshold) is not None:
        ratios = geometric_mean_ratios(columns["old_log_probs"], columns["rollout_log_probs"], mask)
        is_close = (ratios >= 1 / bound) & (ratios <= bound)
        metrics["rollout_rs/masked_fraction"] = float((~is_close).float().mean())
        takes_part &= is_close
    if actor.leaves_responses_out:
        columns["in_policy_loss"] = takes_part
        metrics["actor/responses_in_policy_loss"] = masked_mean(takes_part, columns["graded"])
    if (sampling := actor.importance_sampling) is not None:
        ratios = sampling.ratios(columns["old_log_probs"], columns["rollout_log_probs"], mask)
        columns["importance_weights"] = weights = sampling.weights(ratios)
        counted = mask & (columns["graded"] & takes_part)[:, None]
        if sampling.level == "sequence":
            counted = counted.any(-1, keepdim=True)
        metrics |= importance_metrics(sampling, ratios[counted], weights[counted])
    return metrics


def importance_metrics(sampling: ImportanceSampling, ratios: Tensor, weights: Tensor) -> dict[str, float]:
    """Of the ratios [n] of the tokens or responses in the loss, and of the weights made of them."""
    measured = {
        "mean": ratios.mean(),
        "max": ratios.max() if len(ratios) else torch.nan,
        "weight_mean": weights.mean(),
        "weight_max": weights.max() if len(ratios) else torch.nan,
        f"{'truncated' if sampling.mode == 'truncate' else 'masked'}_fraction": (weights != ratios).float().mean(),
        "effective_sample_size": effective_sample_size(weights),
    }
    return {f"rollout_is/{name}": float(value) for name, value in measured.items()}
