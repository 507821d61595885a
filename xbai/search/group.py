"""The candidates of one question under a rule: which begin, which are given up, which is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from xbai.search.rule import Candidate, Rule


@dataclass
class CandidateGroup:
    """Asks the rule, and remembers what it said. Where the candidates come from is no concern of it.

    Attributes:
        count: most candidates.
        chance: makes calibrated probabilities of scores; None where the rule needs none.
        wave: the candidates that began last.
        pruned: the number of steps after which each pruned candidate was given up.
        ended: the others that are whole.
    """

    rule: Rule
    count: int
    chance: Callable[[float], float] | None = None
    wave: range = range(0)
    pruned: dict[int, int] = field(default_factory=dict)
    ended: dict[int, Candidate] = field(default_factory=dict)

    def begin(self) -> range:
        """The next wave, once the one before has ended; empty where the question has had enough."""
        first = self.wave.stop
        left = self.count - first
        more = self.rule.begin(list(self.ended.values()), left) if left else 0
        self.wave = range(first, first + more)
        return self.wave

    def prune(self, wave: Sequence[Candidate]) -> list[int]:
        """Which candidates are given up, beyond those that were; `wave` has the state of each that began last."""
        pruned = {self.wave[place]: steps for place, steps in self.rule.pruned(wave).items()}
        newly = sorted(pruned.keys() - self.pruned.keys())
        self.pruned |= pruned
        return newly

    def end(self, wave: Sequence[Candidate]) -> None:
        """Each candidate that began last has ended, or was pruned."""
        for number, candidate in zip(self.wave, wave, strict=True):
            if number not in self.pruned:
                chance = self.chance(candidate.score) if self.chance and candidate.score is not None else None
                self.ended[number] = replace(candidate, chance=chance)

    def choose(self, among: Sequence[int] | None = None) -> int:
        """The candidate that is the response: of those that ended, or of some of them (at least one)."""
        numbers = list(self.ended) if among is None else among
        return numbers[self.rule.choose([self.ended[number] for number in numbers])]
