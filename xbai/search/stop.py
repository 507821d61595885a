"""Sampling until one candidate is good enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xbai.search.rule import Candidate, Stopping, decimals


@dataclass(frozen=True)
class Stop(Stopping):
    """Goes on until the chance of one candidate is above the threshold."""

    needs_chance = True

    def certainty(self, ended: Sequence[Candidate]) -> float:
        """See `Rule`."""
        return max(each.chance or 0.0 for each in ended)

    def __str__(self) -> str:
        """As `parse_budget` reads it."""
        return f"stop:{decimals(self.threshold)}/{self.wave}"
