"""Rules of a budget on stored samples: what they would have chosen, and what that would have cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from xbai.measure.replay_questions import SampledQuestion
from xbai.search.group import CandidateGroup
from xbai.search.rule import Rule

RANDOM_ORDERS = 3
ORDER_SEED = 0

Chance = Callable[[float], float]


@dataclass(frozen=True)
class Outcomes:
    """What became of questions; all arrays have the same shape.

    Attributes:
        certainty: the rule's (see `Rule`).
        correct: of the response chosen.
        tokens: generated, those of pruned candidates too.
        begun, pruned: candidates.
    """

    certainty: np.ndarray
    correct: np.ndarray
    tokens: np.ndarray
    begun: np.ndarray
    pruned: np.ndarray

    def at(self, places: np.ndarray) -> Outcomes:
        """Those at one place [...] each along the last axis [..., places]."""
        return Outcomes(*(np.take_along_axis(each, places[..., None], axis=-1)[..., 0] for each in vars(self).values()))

    def last(self) -> Outcomes:
        """The last ones along the last axis."""
        return Outcomes(*(each[..., -1] for each in vars(self).values()))

    def mean(self) -> Outcomes:
        """Means over the last axis."""
        return Outcomes(*(each.mean(axis=-1) for each in vars(self).values()))


def replay(rule: Rule, questions: Sequence[SampledQuestion], chances: Sequence[Chance | None], count: int) -> Outcomes:
    """One rule on all questions.

    Args:
        rule: what is replayed.
        questions: their samples, in the order of the file and in `RANDOM_ORDERS` others.
        chances: one a question, which makes chances of scores where the rule needs them.
        count: most candidates of a question.

    Returns:
        [questions, orders, waves] what there is after each wave; the last one's again where there are fewer waves.
    """
    walks = [
        [_walk(rule, question, order, count, chance) for order in orders(len(question.tokens))]
        for question, chance in zip(questions, chances, strict=True)
    ]
    waves = max(len(walk) for of_question in walks for walk in of_question)
    padded = [[walk + walk[-1:] * (waves - len(walk)) for walk in of_question] for of_question in walks]
    return Outcomes(*np.moveaxis(np.array(padded, dtype=np.float64), -1, 0))


def _walk(
    rule: Rule, question: SampledQuestion, order: Sequence[int], count: int, chance: Chance | None
) -> list[tuple[float, ...]]:
    group, tokens = CandidateGroup(rule, min(count, len(order)), chance), 0
    walk: list[tuple[float, ...]] = []
    while wave := group.begin():
        members = [order[place] for place in wave]
        candidates = [question.candidates[number] for number in members]
        pruned = {order[place]: group.pruned[place] for place in group.prune(candidates)}
        group.end(candidates)
        tokens += question.wave_tokens(members, pruned)
        certainty = rule.certainty(list(group.ended.values()))
        chosen = order[group.choose()]
        walk.append((certainty, float(question.correct[chosen]), tokens, wave.stop, len(group.pruned)))
    return walk


@lru_cache(maxsize=64)
def orders(samples: int) -> list[list[int]]:
    """The order of so many samples in their file, and others; the same for all rules."""
    random = np.random.default_rng((ORDER_SEED, samples))
    return [list(range(samples)), *(random.permutation(samples).tolist() for _ in range(RANDOM_ORDERS))]
