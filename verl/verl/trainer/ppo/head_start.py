"""The start of a score head, in the first step whose responses have steps."""

from __future__ import annotations

import logging

from verl.models.loading import has_score_head
from verl.protocol import DataProto
from verl.trainer.config.schema import ActorRolloutRefConfig
from verl.trainer.ppo.phases import MODEL_INPUT_KEYS
from verl.workers.fsdp_workers import PolicyWorkers
from xbai.sprm import MIN_FEATURES, start_shift, start_totals

logger = logging.getLogger(__name__)


class HeadStart:
    """Standardises features by the first rollouts, and sets a fresh head's bias by their grades; a resumed run's head
    goes on as it was."""

    def __init__(self, config: ActorRolloutRefConfig, is_new_run: bool) -> None:
        score = config.score
        self._objective = score.objective
        self._is_fresh = config.use_score and not has_score_head(config.model.path, score.model_path)
        wanted = score.standardized_start if self._is_fresh else config.use_score and score.standardized_updates
        self._is_due = wanted and is_new_run

    def standardize(self, workers: PolicyWorkers, batch: DataProto, metrics: dict[str, float]) -> bool:
        """Before the log-probs of a step: where the head waits for its start, standardise by `batch`, if that has the
        steps for it.

        Returns:
            Whether `set_bias` is to follow.
        """
        if not self._is_due:
            return False
        inputs = DataProto(batch.batch.select(*MODEL_INPUT_KEYS))
        measured = workers.standardize_score_head(inputs, self._is_fresh).meta_info["metrics"]
        steps = int(measured.pop("steps"))
        metrics |= measured
        if steps < MIN_FEATURES:
            logger.info("the responses have %d steps: later ones will standardise the score head's features", steps)
            return False
        self._is_due = False
        which = "fresh score head starts" if self._is_fresh else "loaded score head is trained"
        logger.info("the %s on features standardised by %d steps", which, steps)
        return self._is_fresh

    def set_bias(self, workers: PolicyWorkers, batch: DataProto) -> None:
        """After the grades of a step: the head's bias, and the `old_step_logits` of `batch` with it."""
        columns = batch.batch
        logits, steps = columns["old_step_logits"], columns["step_feature_mask"]
        shift = start_shift(start_totals(logits, steps, columns["correct"], columns["graded"]), self._objective)
        workers.shift_step_logits(shift)
        columns["old_step_logits"] = logits + shift * steps
