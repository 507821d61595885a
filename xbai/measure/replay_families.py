"""The rules among which a replay looks for the cheapest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from xbai.measure.replay import Chance, Outcomes, replay
from xbai.measure.replay_questions import SampledQuestion
from xbai.search.agreement import Agreement
from xbai.search.budget import Together
from xbai.search.posterior import Posterior
from xbai.search.prune import Prune
from xbai.search.rule import Candidate, Rule, Stopping
from xbai.search.stop import Stop

THRESHOLDS = (*(round(0.05 * number, 2) for number in range(2, 20)), 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)
WAVES = (1, 2, 4, 8)
PRUNED_WAVE = 8
PRUNINGS = tuple(Prune(share, steps) for share, steps in product((0.25, 0.5), ((1,), (2,), (1, 2))))
KINDS: dict[str, tuple[type[Stopping] | None, tuple[Prune | None, ...]]] = {
    "stop": (Stop, (None,)),
    "posterior": (Posterior, (None,)),
    "majority": (Agreement, (None,)),
    "prune": (None, PRUNINGS),
    "prune+stop": (Stop, PRUNINGS),
}
"""How each kind stops, and how it may prune."""

SCORELESS = ("majority",)
"""Kinds that ask for no signal."""


@dataclass(frozen=True)
class Family:
    """Rules of one kind that go by one signal."""

    kind: str
    signal: str

    @property
    def needs_chance(self) -> bool:
        """Its rules do."""
        stopping, _ = KINDS[self.kind]
        return stopping is not None and stopping(THRESHOLDS[-1]).needs_chance


def families(signals: Sequence[str]) -> list[Family]:
    """Each kind with each signal; those that need none, once."""
    return [Family(kind, signal) for kind in KINDS for signal in (signals[:1] if kind in SCORELESS else signals)]


@dataclass(frozen=True)
class OneByOne(Rule):
    """Begins single candidates until a rule has had enough, which is only asked after each of its waves."""

    rule: Stopping

    def begin(self, ended: Sequence[Candidate], left: int) -> int:
        """See `Rule`."""
        return 1 if len(ended) % self.rule.wave else min(1, self.rule.begin(ended, left))

    def certainty(self, ended: Sequence[Candidate]) -> float:
        """See `Rule`."""
        return self.rule.certainty(ended)

    def choose(self, ended: Sequence[Candidate]) -> int:
        """See `Rule`."""
        return self.rule.choose(ended)


@dataclass(frozen=True)
class Replayed:
    """Rules of a family, and what became of each question under them.

    Attributes:
        rules: as text.
        correct, tokens: [rules, questions] means over the orders of the samples.
    """

    rules: list[str]
    correct: np.ndarray
    tokens: np.ndarray

    def line_of(self, rule: str) -> list[int]:
        """The numbers of the rules that differ from this one in the threshold alone, which ascends."""
        return [number for number, other in enumerate(self.rules) if _SHAPE.sub("", other) == _SHAPE.sub("", rule)]


_SHAPE = re.compile(r"(?<=[a-z]:)[\d.]+(?=/)")
"""The threshold in a rule's text."""


def replay_family(
    family: Family, questions: Sequence[SampledQuestion], chances: Sequence[Chance | None], count: int
) -> Replayed:
    """All rules of a family.

    The walk of the strictest serves every threshold, and without pruning, where candidates cost what they cost however
    many begin at once, one by single candidates serves every wave. What comes out is what each rule by itself would do,
    in a fraction of the time.
    """
    stopping, prunings = KINDS[family.kind]
    found: list[tuple[Rule, Outcomes]] = []
    for pruning in prunings:
        if stopping is None and pruning is not None:
            found.append((pruning, replay(pruning, questions, chances, count).last()))
        elif stopping is not None:
            waves = WAVES if pruning is None else (PRUNED_WAVE,)
            strictest = stopping(THRESHOLDS[-1], waves[-1])
            longest = OneByOne(strictest) if pruning is None else Together(pruning, strictest)
            walk = replay(longest, questions, chances, count)
            for rule in (stopping(threshold, wave) for wave in waves for threshold in THRESHOLDS):
                found.append((rule if pruning is None else Together(pruning, rule), _stopped(walk, rule)))
    means = [outcomes.mean() for _, outcomes in found]
    return Replayed(
        [str(rule) for rule, _ in found],
        np.stack([mean.correct for mean in means]),
        np.stack([mean.tokens for mean in means]),
    )


def _stopped(walk: Outcomes, rule: Stopping) -> Outcomes:
    """[questions, orders] where the rule has enough in the walk of a stricter one, or at its end."""
    is_enough = (walk.certainty > rule.threshold) & (walk.begun % rule.wave == 0)
    return walk.at(np.where(is_enough.any(axis=-1), is_enough.argmax(axis=-1), walk.begun.shape[-1] - 1))
