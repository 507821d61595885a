"""Sampling until one candidate is good enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xbai.search.rule import Candidate, Stopping


@dataclass(frozen=True)
class Stop(Stopping):
    """Goes on until the chance of one candidate is above the threshold."""

    name = "stop"
    needs_chance = True

    def certainty(self, ended: Sequence[Candidate]) -> float:
        """See `Rule`."""
        return max(each.chance or 0.0 for each in ended)
