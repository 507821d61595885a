"""The budget of a run: what its settings, its requests and its choice of a response have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from xbai.calibration import ScoreChance
from xbai.search.budget import parse_budget
from xbai.search.rule import Candidate, Rule

ALL = str(Rule())


@dataclass(frozen=True)
class RunBudget:
    """A rule for each group of candidates.

    Attributes:
        candidates: most candidates of a group.
        chance: the calibrated probability that a response of a score is right; None where the rule needs none.
        answers_once: the candidates only think, and the chosen one alone answers.
    """

    rule: Rule
    candidates: int
    chance: ScoreChance | None = None
    answers_once: bool = False

    @property
    def options(self) -> str:
        """Those of the inference that ask for it."""
        budget = "" if str(self.rule) == ALL else f"--budget {self.rule}"
        return " ".join(filter(None, (budget, "--answer_once" if self.answers_once else "")))

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.rule}, answer once" if self.answers_once else str(self.rule)

    def to_settings(self) -> dict[str, Any]:
        """As `RunSettings` has it."""
        return {
            "rule": str(self.rule),
            "candidates": self.candidates,
            "chance": None if self.chance is None else asdict(self.chance),
            **({"answers_once": True} if self.answers_once else {}),
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any] | None) -> RunBudget | None:
        """The inverse, from a run's settings; None where it had no budget."""
        if not (budget := (settings or {}).get("budget")):
            return None
        chance = None if budget["chance"] is None else ScoreChance(**budget["chance"])
        rule = Rule() if budget["rule"] == ALL else parse_budget(budget["rule"])
        return cls(rule, budget["candidates"], chance, budget.get("answers_once", False))

    def to_request(self, data_source: str) -> dict[str, Any]:
        """As fields of a `/generate` request, for answers that are compared as this data source's."""
        settings = self.to_settings()
        budget = {"rule": settings["rule"], "chance": settings["chance"], "data_source": data_source}
        fields: dict[str, Any] = {} if settings["rule"] == ALL else {"budget": budget}
        return {**fields, "answer_once": True} if self.answers_once else fields

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
