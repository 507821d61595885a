"""A request with a budget: wave after wave of its samples, until the rule has enough."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from xbai.calibration import SPRM_CALIBRATION_FILE, Calibration, ScoreChance
from xbai.engine import Completion, Engine, Sample
from xbai.errors import UserError
from xbai.grading import AnswerGroups
from xbai.model_identity import is_same_model, model_identity
from xbai.search.budget import parse_budget
from xbai.search.budgeted import BudgetedSamples
from xbai.search.rule import Rule
from xbai.serve.engine_thread import EngineThread
from xbai.serve.errors import ServiceError
from xbai.serve.schemas import Budget

logger = logging.getLogger(__name__)

COMPARISON_TIMEOUT_S = 2.0
"""For whether two answers are equal, which others wait for; two that take longer vote apart."""


class Watch(Protocol):
    """Somebody who looks at the samples of a request while they are written."""

    def begin(self, wave: Sequence[Sample]) -> None:
        """These are about to begin; those before have ended."""

    def after_step(self, engine: Engine, finished: Mapping[Sample, Completion]) -> None:
        """The engine has made a step; called on the thread that owns it, with the finished ones of the wave."""


async def complete_budgeted(
    thread: EngineThread,
    samples: list[Sample],
    budget: Budget | None,
    own_chance: ScoreChance | None,
    client: str,
    watch: Watch | None = None,
) -> BudgetedSamples:
    """As `EngineThread.complete`, of those of the samples that the budget's rule wants; of all without one.

    Args:
        own_chance: of the calibration that lies beside the model, for a budget that brings none.

    Raises:
        ServiceError: 422 for a rule that goes by what the request does not say; else as `EngineThread.complete`.
    """
    rule = Rule() if budget is None else parse_budget(budget.rule)
    chance = own_chance
    if budget is not None:
        if budget.chance is not None:
            chance = ScoreChance(budget.chance.slope, budget.chance.intercept)
        if rule.needs_chance and chance is None:
            raise ServiceError(422, f"budget.chance: {rule} needs one, or a calibrated model (xbai calibrate)")
        if rule.needs_answers and budget.data_source is None:
            raise ServiceError(422, f"budget.data_source: {rule} needs it, to tell which answers are equal")
    request = BudgetedSamples(samples, rule, chance)
    groups = _answer_groups(budget.data_source) if budget is not None and rule.needs_answers else None

    def after_step(engine: Engine, finished: Mapping[Sample, Completion]) -> Mapping[Sample, Completion]:
        pruned = request.prune(engine, finished) if rule.prunes else {}
        if watch is not None:
            watch.after_step(engine, {**finished, **pruned})
        return pruned

    try:
        while wave := request.begin():
            if watch is not None:
                watch.begin(wave)
            completions = await thread.complete(wave, client, after_step if watch or rule.prunes else None)
            finished = dict(zip(wave, completions, strict=True))
            if groups is None:
                request.end(finished)
            else:
                await asyncio.to_thread(request.end, finished, lambda responses: groups.of([responses])[0])
    finally:
        if groups is not None:
            # Elsewhere, as it may wait for a comparison.
            asyncio.get_running_loop().run_in_executor(None, groups.close)
    return request


def chance_beside(model_path: str) -> ScoreChance | None:
    """That of the calibration in the model's folder, where it is of this model."""
    if not (Path(model_path) / SPRM_CALIBRATION_FILE).is_file():
        return None
    calibration = Calibration.read(model_path)
    if not is_same_model(calibration.identity, model_identity(model_path)):
        logger.warning("%s: the calibration is of another model and is not used", model_path)
        return None
    return calibration.chance


def _answer_groups(data_source: str | None) -> AnswerGroups:
    try:
        return AnswerGroups(data_source or "", workers=1, timeout_s=COMPARISON_TIMEOUT_S)
    except UserError as error:
        raise ServiceError(422, f"budget.{error}") from None
