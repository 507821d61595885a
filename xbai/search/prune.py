"""Giving up candidates that do worse than others after as many steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xbai.search.choice import sortable_scores
from xbai.search.rule import Candidate, Rule, decimals


@dataclass(frozen=True)
class Prune(Rule):
    """Keeps the best `share` of a wave, by the value after each of these numbers of steps (successive halving).

    It is decided once all that were kept so far have as many steps, or have ended before: those count with what they
    have, and are never pruned.
    """

    share: float
    steps: tuple[int, ...]
    prunes = True

    def pruned(self, wave: Sequence[Candidate]) -> Mapping[int, int]:
        """See `Rule`; of equals the first stays, and one always does."""
        kept, out = list(range(len(wave))), dict[int, int]()
        for steps in self.steps:
            if any(len(wave[number].values) < steps and not wave[number].has_ended for number in kept):
                break
            values = sortable_scores([_value_after(wave[number], steps) for number in kept])
            best_first = [kept[place] for place in (-values).argsort(kind="stable")]
            count = math.ceil(self.share * len(kept))
            out |= {number: steps for number in best_first[count:] if len(wave[number].values) >= steps}
            kept = sorted(best_first[:count])
        return out

    def __str__(self) -> str:
        """As `parse_budget` reads it."""
        return f"prune:{decimals(self.share)}@{','.join(map(str, self.steps))}"


def _value_after(candidate: Candidate, steps: int) -> float | None:
    return candidate.values[:steps][-1] if candidate.values else None
