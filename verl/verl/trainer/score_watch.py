"""A score head that cannot learn any more says so."""

from __future__ import annotations

import logging

from xbai.sprm import StepCounts

logger = logging.getLogger(__name__)

PATIENCE = 5
"""Updates in a row in which a class counted nothing before it is said."""
REPEAT_EVERY = 50
"""Updates until it is said again."""


class UncountedClassWatch:
    """Warns where one class has steps, and for several updates in a row none of them counts in the score loss.

    Agreement weighting leaves out the steps that the head gets wrong. When it gets all steps of a class wrong, nothing
    pulls it back, and with class balance the weights make the whole loss 0.

    The count is not part of a checkpoint: each start of a run says it anew, `PATIENCE` updates later, and names the
    `section` of the configuration that has the switches.
    """

    def __init__(self, section: str) -> None:
        self._section = section
        self._updates = {"right": 0, "wrong": 0}

    def observe(self, counted: StepCounts, steps: StepCounts) -> None:
        """After an update: the graded steps of each class that counted in it, and that there were."""
        self._observe("right", "below", counted.positive, steps.positive)
        self._observe("wrong", "above", counted.negative, steps.negative)

    def _observe(self, name: str, side: str, counted: float, steps: float) -> None:
        if counted > 0:
            self._updates[name] = 0
        elif steps > 0:
            self._updates[name] += 1
            if self._updates[name] >= PATIENCE and (self._updates[name] - PATIENCE) % REPEAT_EVERY == 0:
                self._warn(name, side)

    def _warn(self, name: str, side: str) -> None:
        logger.warning(
            "the score head is one-sided: for %d updates no step of a %s answer counted in the score loss, because the "
            "head puts all of them %s 0.5 and agreement weighting leaves out what it gets wrong, so it cannot recover. "
            "Go on with %s.agreement_weighting=false; or start anew, with a fresh head on standardised features "
            "(%s.standardized_start=true). See docs/training.md, The health of the score head",
            self._updates[name], name, side, self._section, self._section,
        )  # fmt: skip
