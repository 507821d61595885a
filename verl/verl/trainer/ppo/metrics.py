"""What one training or validation batch says about the run. A value that a batch cannot define is nan."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from verl.protocol import DataProto
from xbai.sprm import auc, best_of_n_gain, sprm_metrics, trajectory_scores, within_prompt_auc
from xbai.sprm.groups import Prompts
from xbai.sprm.loss import StepCounts, count_by_class


@contextmanager
def timed(phase: str, metrics: dict[str, float]) -> Iterator[None]:
    """Add the seconds spent inside as `timing_s/{phase}`."""
    start = time.perf_counter()
    yield
    metrics[f"timing_s/{phase}"] = time.perf_counter() - start


def masked_mean(values: Tensor, mask: Tensor) -> float:
    """Mean of `values` where `mask`; nan where it is empty."""
    return float(values[mask.bool()].float().mean())


def train_metrics(batch: DataProto, end_token_ids: Sequence[int]) -> dict[str, float]:
    """Rewards, advantages, lengths, and what was computed of entropy, agreement of rollout and actor and the score head
    before the update."""
    columns = batch.batch
    mask, graded, correct = columns["response_mask"].bool(), columns["graded"], columns["correct"]
    rewards, lengths = columns["token_level_scores"].sum(-1), mask.sum(-1)
    uids = batch.non_tensor_batch["uid"]
    metrics = {
        "reward/mean": masked_mean(rewards, graded),
        "reward/pass_rate": masked_mean(correct, graded),
        "reward/ungraded": float((~graded).sum()),
        "reward/mixed_prompts": mixed_prompts(uids, correct, graded),
        "response_length/mean": float(lengths.float().mean()),
        "response_length/max": float(lengths.max()),
        "response_length/truncated": float(is_truncated(columns["responses"], mask, end_token_ids).float().mean()),
        "prompt_length/mean": float(columns["attention_mask"].sum(-1).float().mean() - lengths.float().mean()),
        "rollout/distinct_responses": float(columns["kinds"].max() + 1) / len(columns),
    }
    if "old_log_probs" in columns:
        metrics["actor/entropy"] = masked_mean(columns["entropys"], mask)
        metrics |= log_prob_difference(columns["rollout_log_probs"], columns["old_log_probs"], mask)
    kept = mask & graded[:, None]
    for name in ("advantages", "returns"):
        metrics |= {f"{name}/{what}": value for what, value in _spread(columns[name][kept]).items()}
    if "values" in columns:
        metrics["critic/explained_variance"] = explained_variance(columns["values"], columns["returns"], kept)
    if "ref_kl" in columns:
        metrics["actor/ref_kl"] = masked_mean(columns["ref_kl"], mask)
    elif "ref_log_prob" in columns and "old_log_probs" in columns:
        metrics["actor/ref_kl"] = masked_mean(columns["old_log_probs"] - columns["ref_log_prob"], mask)
    if "old_step_logits" in columns:
        logits, steps = columns["old_step_logits"], columns["step_feature_mask"]
        measured = choice_metrics(trajectory_scores(logits, steps), correct, graded, uids)
        measured |= sprm_metrics(logits, steps, correct, graded)
        metrics |= {f"score/{name}": value for name, value in measured.items()}
    if "rollout_scores" in columns:
        scores = columns["rollout_scores"]
        measured = choice_metrics(scores, correct, graded, uids)
        metrics |= {f"rollout/{name}": value for name, value in measured.items()}
        judged = graded & (scores > 0)
        metrics |= {
            "rollout/score_mean": masked_mean(scores, judged),
            "rollout/score_auc": auc(scores[judged], correct[judged]),
        }
    return metrics


def choice_metrics(scores: Tensor, correct: Tensor, graded: Tensor, prompts: Prompts) -> dict[str, float]:
    """How well scores choose among the responses to a prompt; all [B]. A score of 0 stands for none, without a step:
    Best-of-N takes such a response last, and an AUC does not count it."""
    judged = graded & (scores > 0)
    of_row = np.asarray(prompts)
    return {
        "within_prompt_auc": within_prompt_auc(scores[judged], correct[judged], of_row[judged.numpy()]),
        "best_of_n_gain": best_of_n_gain(scores[graded], correct[graded], of_row[graded.numpy()]),
    }


def steps_by_class(batch: DataProto) -> StepCounts:
    """The steps of right and of wrong responses that could be graded."""
    columns = batch.batch
    steps = columns["step_feature_mask"] & columns["graded"][:, None]
    return StepCounts(*count_by_class(steps, columns["correct"]).tolist())


def _spread(values: Tensor) -> dict[str, float]:
    if not len(values):
        return dict.fromkeys(("mean", "max", "min"), float("nan"))
    return {"mean": float(values.mean()), "max": float(values.max()), "min": float(values.min())}


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Share of the returns' variance that the critic's values foresaw, at most 1; nan without variance; all [B, R]."""
    values, returns = values[mask.bool()].double(), returns[mask.bool()].double()
    total = returns.var(correction=0)
    return float(1 - (returns - values).var(correction=0) / total) if total > 0 else float("nan")


def mixed_prompts(uids: Prompts, correct: Tensor, graded: Tensor) -> float:
    """Share of prompts with both right and wrong responses: with rewards of 0 and 1, all that GRPO learns from."""
    outcomes: dict[Any, set[float]] = {uid: set() for uid in uids}
    for uid, value in zip(np.asarray(uids)[graded.numpy()], correct[graded].tolist(), strict=True):
        outcomes[uid].add(value)
    return sum(len(values) > 1 for values in outcomes.values()) / len(outcomes)


def is_truncated(responses: Tensor, mask: Tensor, end_token_ids: Sequence[int]) -> Tensor:
    """[B] bool: the response was cut, at its greatest length or because it grew too old: its last token is none of
    `end_token_ids`."""
    last = responses.gather(1, (mask.long().sum(-1, keepdim=True) - 1).clamp(min=0))
    return ~torch.isin(last[:, 0], torch.tensor(end_token_ids))


def log_prob_difference(rollout: Tensor, actor: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the rollout engine's log-probs of its own tokens are from the actor's; all [B, R].

    `mismatch_kl` is the low-variance (k3) estimate of KL(engine, actor).
    """
    log_ratio = (actor - rollout)[mask.bool()]
    difference = _spread(log_ratio.abs())
    return {
        "rollout/log_prob_diff_mean": difference["mean"],
        "rollout/log_prob_diff_max": difference["max"],
        "rollout/mismatch_kl": float((log_ratio.expm1() - log_ratio).mean()),
    }


class ValidationResult(NamedTuple):
    """What is kept of a batch of B validation responses, those of one prompt next to each other."""

    sources: np.ndarray
    """[B] data sources."""
    correct: Tensor
    """[B] float."""
    graded: Tensor
    """[B] bool."""
    lengths: Tensor
    """[B] response tokens."""
    scores: Tensor | None
    """[B] trajectory scores, with a score head."""


def validation_metrics(parts: Sequence[ValidationResult], n: int) -> dict[str, float]:
    """pass@1 (where there are several data sources, for each too); with a score head the AUC of its trajectory scores
    and, for `n` > 1 responses a prompt, their AUC within a prompt and the accuracy of Best-of-n."""
    sources = np.concatenate([part.sources for part in parts])
    correct, graded = torch.cat([part.correct for part in parts]), torch.cat([part.graded for part in parts])
    lengths = torch.cat([part.lengths for part in parts])
    metrics = {
        "val/pass@1": masked_mean(correct, graded),
        "val/ungraded": float((~graded).sum()),
        "val/response_length": float(lengths.float().mean()),
    }
    if len(found := sorted(set(sources))) > 1:
        for name in found:
            metrics[f"val/{name}/pass@1"] = masked_mean(correct, graded & torch.as_tensor(sources == name))
    if scored := [part.scores for part in parts if part.scores is not None]:
        scores = torch.cat(scored)
        if n > 1:
            prompts = (torch.arange(len(scores)) // n)[graded].numpy()
            metrics["val/within_prompt_auc"] = within_prompt_auc(scores[graded], correct[graded], prompts)
            metrics[f"val/best_of_{n}"] = best_of_n(scores, correct, graded, n)
        metrics["val/auc"] = auc(scores[graded], correct[graded])
    return metrics


def best_of_n(scores: Tensor, correct: Tensor, graded: Tensor, n: int) -> float:
    """Accuracy of picking each prompt's response with the highest score [B], over picks that could be graded."""
    best = scores.view(-1, n).argmax(-1, keepdim=True)
    picked = correct.view(-1, n).gather(1, best).squeeze(-1)
    return masked_mean(picked, graded.view(-1, n).gather(1, best).squeeze(-1))
