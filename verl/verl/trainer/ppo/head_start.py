"""The start of a fresh score head, in the first step whose responses have steps."""

from __future__ import annotations

import logging

from omegaconf import DictConfig

from verl.protocol import DataProto
from verl.single_controller import RayWorkerGroup
from verl.utils.model import has_score_head
from xbai.sprm import MIN_FEATURES, ScoreObjective, start_shift, start_totals

logger = logging.getLogger(__name__)


class HeadStart:
    """Standardises a fresh head's features by the first rollouts, and sets its bias by their grades.

    Args:
        config: the `actor_rollout_ref` section.
        is_new_run: a resumed run's head is never touched, and nor is one that was loaded.
    """

    def __init__(self, config: DictConfig, is_new_run: bool) -> None:
        score = config.score
        self._objective = ScoreObjective.from_config(score)
        is_fresh = config.use_score and not has_score_head(config.model.path, score.model_path)
        self.is_due: bool = is_fresh and is_new_run and score.standardized_start

    def standardize(self, workers: RayWorkerGroup, inputs: DataProto, metrics: dict[str, float]) -> bool:
        """Before the log-probs of a step: standardise by `inputs`; returns whether they had the steps for it."""
        measured = workers.standardize_score_head(inputs).meta_info["metrics"]
        steps = int(measured.pop("steps"))
        metrics |= measured
        if steps < MIN_FEATURES:
            logger.info("the responses have %d steps: later ones will standardise the fresh score head's start", steps)
            return False
        logger.info("the fresh score head starts on features standardised by %d steps", steps)
        self.is_due = False
        return True

    def set_bias(self, workers: RayWorkerGroup, batch: DataProto) -> None:
        """After the grades of a step: the head's bias, and the `old_step_logits` of `batch` with it."""
        columns = batch.batch
        logits, steps = columns["old_step_logits"], columns["step_feature_mask"]
        shift = start_shift(start_totals(logits, steps, columns["correct"], columns["graded"]), self._objective)
        workers.shift_step_logits(shift)
        columns["old_step_logits"] = logits + shift * steps
