"""By what a score head learns, with its backbone or alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from verl.trainer.config.fields import Flag, Section
from xbai.sprm import ScoreObjective

Loss = Literal["step_bce", "outcome_bce", "pairwise", "both"]
Aggregation = Literal["geometric", "mean_logit", "product", "soft_min"]


@dataclass(frozen=True, kw_only=True)
class ScoreLosses(Section):
    """Part of a `score` section."""

    loss: Loss
    aggregation: Aggregation
    agreement_weighting: Flag
    class_balance: Flag

    @property
    def objective(self) -> ScoreObjective:
        """The losses that are added up."""
        return ScoreObjective(self.loss, self.aggregation, self.agreement_weighting, self.class_balance)
