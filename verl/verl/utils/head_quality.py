"""How well a head judges responses whose features are kept."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from verl.utils.dataset.step_dataset import StepDataset
from xbai.measure.estimators import Estimate
from xbai.measure.graded import GradedQuestion
from xbai.measure.separation import separation
from xbai.measure.strategies import accuracies
from xbai.measure.summary import SUMMARY_COUNTS
from xbai.sprm import trajectory_scores


def head_quality(head: nn.Module, data: StepDataset, device: torch.device) -> dict[str, float]:
    """A head's validation by the geometric means of all responses, by which services rank.

    `val/within_prompt_auc` is the chance that of two responses to a prompt the right one is scored higher.
    """
    questions = candidates(head, data, device)
    separated = separation([q.scores for q in questions], [q.correct for q in questions])
    fewest = min(len(question.correct) for question in questions)
    counts = [n for n in SUMMARY_COUNTS if n <= fewest]
    chosen = accuracies(questions, ["best_of_n"], [1, *counts])["best_of_n"]
    return {
        "val/within_prompt_auc": separated.within_prompt_auc.mean,
        **{f"val/best_of_{n}": Estimate.over(chosen[n]).mean for n in counts},
        "val/auc": separated.auc,
        "val/pass@1": Estimate.over(chosen[1]).mean,
    }


@torch.no_grad()
def candidates(head: nn.Module, data: StepDataset, device: torch.device) -> list[GradedQuestion]:
    """All responses with their scores, prompt by prompt, as measures take them; but prompts without any grade."""
    was_training = head.training
    head.eval()
    step_scores: list[list[float]] = []
    scores: list[float] = []
    for batch in data.in_order():
        rows = batch.rows(head(batch.features.to(device)).cpu())
        scores += trajectory_scores(rows, batch.mask).tolist()
        counts = batch.mask.sum(-1).tolist()
        step_scores += [row[:count].tolist() for row, count in zip(rows.sigmoid(), counts, strict=True)]
    head.train(was_training)
    correct = torch.where(data.graded, data.correct, torch.nan).double().numpy()
    log_probs = data.mean_log_prob.double().nan_to_num(nan=-torch.inf).numpy()
    return [
        GradedQuestion(
            key=(number, ""),
            scores=np.array([scores[i] for i in group]),
            correct=correct[group],
            keys=[None] * len(group),
            step_scores=[step_scores[i] for i in group],
            token_counts=data.tokens[group].tolist(),
            finish_reasons=[None] * len(group),
            mean_log_probs=log_probs[group],
        )
        for number, group in enumerate(data.groups)
        if not np.isnan(correct[group]).all()
    ]
