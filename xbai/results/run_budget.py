"""The budget of a run: what its settings, its requests and its choice of a response have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from xbai.calibration import ScoreChance
from xbai.search.budget import parse_budget
from xbai.search.rule import Candidate, Rule


@dataclass(frozen=True)
class RunBudget:
    """A rule for each group of candidates.

    Attributes:
        candidates: most candidates of a group.
        chance: the calibrated probability that a response of a score is right; None where the rule needs none.
    """

    rule: Rule
    candidates: int
    chance: ScoreChance | None = None

    def to_settings(self) -> dict[str, Any]:
        """As `RunSettings` has it."""
        return {
            "rule": str(self.rule),
            "candidates": self.candidates,
            "chance": None if self.chance is None else asdict(self.chance),
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any] | None) -> RunBudget | None:
        """The inverse, from a run's settings; None where it had no budget."""
        if not (budget := (settings or {}).get("budget")):
            return None
        chance = None if budget["chance"] is None else ScoreChance(**budget["chance"])
        return cls(parse_budget(budget["rule"]), budget["candidates"], chance)

    def to_request(self, data_source: str) -> dict[str, Any]:
        """As the field `budget` of a `/generate` request, for answers that are compared as this data source's."""
        settings = self.to_settings()
        return {"rule": settings["rule"], "chance": settings["chance"], "data_source": data_source}

    def choose(self, scores: Sequence[float | None], answers: Sequence[str | None]) -> int | None:
        """Which candidate is the response; None where none has a score, which those have that are whole.

        Args:
            scores: one each.
            answers: the same for equal ones; None for all where the rule does not need any.
        """
        whole = {number: score for number, score in enumerate(scores) if score is not None}
        ended = [
            Candidate((), score, self.chance(score) if self.chance else None, answers[number])
            for number, score in whole.items()
        ]
        return list(whole)[self.rule.choose(ended)] if ended else None
