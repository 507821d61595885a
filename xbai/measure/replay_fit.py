"""Rules chosen on one half of the questions and reported on the other."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from xbai.errors import UserError
from xbai.measure.chance_fit import fit_chance
from xbai.measure.estimators import Estimate
from xbai.measure.graded import GradedQuestion
from xbai.measure.replay import Chance, Outcomes, replay
from xbai.measure.replay_families import Family, Replayed, families, replay_family
from xbai.measure.replay_questions import SampledQuestion, possible_signals, sampled_question
from xbai.measure.strategies import REFERENCE_N, accuracies, candidate_counts
from xbai.search.rule import Rule

logger = logging.getLogger(__name__)

HALVES_SEED = 0


@dataclass(frozen=True)
class Baseline:
    """Best-of-n of each question [questions]: its exact expectation over the order of the samples."""

    correct: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Point:
    """Accuracy, and tokens a question."""

    accuracy: Estimate
    tokens: Estimate

    @classmethod
    def of(cls, correct: np.ndarray, tokens: np.ndarray) -> Point:
        """Of one value a question each."""
        return cls(Estimate.over(correct), Estimate.over(tokens))


@dataclass(frozen=True)
class Fitted:
    """The cheapest rule of a family that is as good as Best-of-n.

    Attributes:
        rule: chosen on all questions, chances being fitted on the half without the question.
        rules_of_halves: chosen on the one and the other half; each is measured on the questions of the other.
        point: what these two achieve together.
        difference: its accuracy less Best-of-n's, paired by question.
        share: its tokens divided by Best-of-n's.
    """

    rule: str
    rules_of_halves: tuple[str, str]
    point: Point
    difference: Estimate
    share: float


@dataclass(frozen=True)
class Run:
    """All rules of a family replayed.

    Attributes:
        own: with chances fitted on the half that has the question, which is what is known when a rule is chosen.
        other: with chances fitted on the half without it.
    """

    family: Family
    own: Replayed
    other: Replayed


class Replay:
    """The samples of a file, in two halves by question, and the chances fitted on each.

    Attributes:
        n: most candidates of a question.
        first: [questions] bool, the first half.
        signals: by which samples can be judged here.
        samples: by signal.
        best_of_n: by the number of candidates.
    """

    def __init__(self, questions: Sequence[GradedQuestion], n: int) -> None:
        self.n = n
        self.signals = possible_signals(questions)
        self.first = halves(len(questions))
        self.samples = {signal: [sampled_question(each, signal) for each in questions] for signal in self.signals}
        self._chances = {signal: _half_chances(self.samples[signal], self.first) for signal in self.signals}
        self.best_of_n = best_of_n(questions, n)

    @property
    def targets(self) -> list[int]:
        """The n whose accuracy rules are to reach."""
        return sorted({min(REFERENCE_N, self.n), self.n})

    def held_out(self, rule: Rule, chance: Chance | None = None) -> Outcomes:
        """[questions] one rule by the score, with this chance or else that fitted on the half without the question.

        Raises:
            UserError: it needs chances, and there are none.
        """
        if rule.needs_chance and chance is None and not self._chances["score"]:
            raise UserError(f"{rule}: the scores of these samples tell no chance of being right")
        chances = [chance] * len(self.first) if chance else self._chances_of("score", rule.needs_chance, own=False)
        return replay(rule, self.samples["score"], chances, self.n).last().mean()

    def runs(self, count: int) -> list[Run]:
        """All families among at most `count` candidates, without those whose signal tells no chance."""
        return [
            self._run(family, count)
            for family in families(self.signals)
            if self._chances[family.signal] or not family.needs_chance
        ]

    def _run(self, family: Family, count: int) -> Run:
        def replayed(own: bool) -> Replayed:
            chances = self._chances_of(family.signal, family.needs_chance, own)
            return replay_family(family, self.samples[family.signal], chances, count)

        other = replayed(own=False)
        return Run(family, replayed(own=True) if family.needs_chance else other, other)

    def _chances_of(self, signal: str, needed: bool, own: bool) -> Sequence[Chance | None]:
        chances = self._chances[signal]
        return [chances[bool(is_first) == own] if needed else None for is_first in self.first]

    def fit(self, run: Run, target: int, tolerance: float) -> Fitted:
        """The cheapest rule that is no worse than Best-of-n (see `cheapest`) on the questions that it is chosen on."""
        baseline, rules = self.best_of_n[target], run.other.rules
        correct, tokens = np.empty(len(self.first)), np.empty(len(self.first))
        chosen = []
        for half in (self.first, ~self.first):
            number = cheapest(run.own.correct[:, half], run.own.tokens[:, half], baseline.correct[half], tolerance)
            correct[~half], tokens[~half] = run.other.correct[number, ~half], run.other.tokens[number, ~half]
            chosen.append(rules[number])
        of_all = cheapest(run.other.correct, run.other.tokens, baseline.correct, tolerance)
        return Fitted(
            rules[of_all],
            (chosen[0], chosen[1]),
            Point.of(correct, tokens),
            Estimate.over(correct - baseline.correct),
            float(tokens.mean() / baseline.tokens.mean()),
        )


def halves(questions: int) -> np.ndarray:
    """[questions] bool: which are in the first half."""
    return np.random.default_rng(HALVES_SEED).permutation(questions) < (questions + 1) // 2


def cheapest(correct: np.ndarray, tokens: np.ndarray, baseline: np.ndarray, tolerance: float) -> int:
    """The number of the rule with the fewest tokens among those that are no worse than a baseline, or else the best.

    No worse is a rule that is right at most `tolerance` less often, even where the difference, paired by question, is a
    standard error below what was measured: of many rules one that is only lucky would else be the cheapest.

    Args:
        correct, tokens: [rules, questions].
        baseline: [questions] how often it is right.
        tolerance: between 0 and 1.
    """
    differences = correct - baseline
    errors = differences.std(axis=1, ddof=1) / np.sqrt(len(baseline)) if len(baseline) > 1 else 0.0
    surely = differences.mean(axis=1) - errors
    enough = surely >= min(-tolerance, surely.max())
    return int(np.where(enough, tokens.mean(axis=1), np.inf).argmin())


def _half_chances(samples: Sequence[SampledQuestion], first: np.ndarray) -> Mapping[bool, Chance]:
    """By whether it was fitted on the first half; empty where a half teaches none."""
    try:
        return {
            is_first: cache(
                fit_chance(
                    [each.scores for each, of in zip(samples, first, strict=True) if of == is_first],
                    [each.correct for each, of in zip(samples, first, strict=True) if of == is_first],
                )
            )
            for is_first in (True, False)
        }
    except UserError as error:
        logger.warning("rules that need chances are left out of what goes by this signal: %s", error)
        return {}


def best_of_n(questions: Sequence[GradedQuestion], n: int) -> dict[int, Baseline]:
    """By the number of candidates, powers of two up to n."""
    counts = candidate_counts(n)
    correct = accuracies(questions, ["best_of_n"], counts)["best_of_n"]
    graded = [question.graded() for question in questions]
    mean = np.array([np.mean([count or 0 for count in question.token_counts]) for question in graded])
    sizes = np.array([len(question.correct) for question in graded])
    return {count: Baseline(correct[count], np.minimum(count, sizes) * mean) for count in counts}
