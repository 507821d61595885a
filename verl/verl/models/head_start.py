"""The standardised start of a score head that is sharded over ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor

from verl.models.fsdp import local_device, reshard
from verl.models.joint_model import JointModel
from verl.models.packing import Batch
from xbai.sprm import (
    MIN_FEATURES,
    ScoreHead,
    ScoreObjective,
    observed_inputs,
    shift_head,
    standardize_head,
    start_shift,
    start_totals,
)

logger = logging.getLogger(__name__)


def standardize_features(model: JointModel, compute: Callable[[], object], is_fresh: bool = True) -> int:
    """Standardise what the score head sees by the step features of all ranks. A collective.

    Args:
        compute: runs forward passes; of a sequence-parallel group each rank's see other steps.
        is_fresh: a fresh head gives standardised features the logits that it gave features as they are. Any other goes
            on giving the same logits, and only its optimiser sees it on standardised features.

    Returns:
        How many steps there were; with fewer than `MIN_FEATURES` the head stays as it is.
    """
    head = head_of(model)
    with observed_inputs(head, local_device()) as moments:
        compute()
    reshard(model)
    dist.all_reduce(moments.totals)
    if moments.count >= MIN_FEATURES:
        if is_fresh:
            standardize_head(head, moments)
        else:
            head.standardization = moments.standardization
    return moments.count


def start_head(
    model: JointModel, batches: Sequence[Batch], evaluate: Callable[[Batch], Tensor], objective: ScoreObjective
) -> None:
    """Standardise the features of a fresh head by rows whose grades are known, and set its bias. A collective.

    Args:
        batches: as many on every rank, with `step_feature_mask [B, T]`, `correct` and `graded [B]`.
        evaluate: a batch's step logits [B, T] in evaluation mode.
        objective: of the training that follows.
    """
    steps = standardize_features(model, lambda: [evaluate(batch) for batch in batches])
    if steps < MIN_FEATURES:
        logger.warning("the score head starts as it is: there are %d steps to standardise its features by", steps)
        return
    names = ("step_feature_mask", "correct", "graded")
    first, *others = (start_totals(evaluate(batch), *(batch[name] for name in names)) for batch in batches)
    totals = sum(others, start=first)
    reshard(model)
    dist.all_reduce(totals)
    shift_head(head_of(model), start_shift(totals, objective))
    logger.info("the fresh score head starts on features standardised by %d steps", steps)


def head_of(model: JointModel) -> ScoreHead:
    """Its score head; a `ValueError` where it has none."""
    if model.score_head is None:
        raise ValueError("the model has no score head")
    return model.score_head
