"""What a replay needs of stored samples: what each was worth after each step, and how many tokens it had then."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xbai.aggregation import running_scores
from xbai.errors import UserError
from xbai.measure.graded import GradedQuestion
from xbai.search.rule import Candidate

Worth = tuple[list[float], float]
"""After each step, and as a whole: between 0 and 1."""


@dataclass(frozen=True)
class SampledQuestion:
    """The samples of one question, K in number, as one signal sees them.

    Attributes:
        candidates: [K] whole, without chances.
        correct: [K] 1.0 or 0.0.
        tokens: [K] how many each has.
        step_ends: [K] how many tokens each has at the end of each step.
    """

    candidates: list[Candidate]
    correct: np.ndarray
    tokens: list[int]
    step_ends: list[list[int]]

    @property
    def scores(self) -> np.ndarray:
        """[K] by the signal."""
        return np.array([candidate.score for candidate in self.candidates], dtype=np.float64)

    def wave_tokens(self, wave: Sequence[int], pruned: Mapping[int, int]) -> int:
        """What a wave of samples costs that are decoded side by side, one token a step.

        Args:
            wave: their numbers.
            pruned: the number of steps after which each pruned one is given up. It is known once all that were kept
                until then have as many steps or have ended, and no earlier than what was decided before.
        """
        kept, spent, moment = list(wave), 0, 0
        for steps in sorted(set(pruned.values())):
            moment = max(moment, *(self._tokens_after(number, steps) for number in kept))
            spent += sum(min(moment, self.tokens[number]) for number in kept if pruned.get(number) == steps)
            kept = [number for number in kept if pruned.get(number) != steps]
        return spent + sum(self.tokens[number] for number in kept)

    def _tokens_after(self, number: int, steps: int) -> int:
        ends = self.step_ends[number]
        return ends[steps - 1] if len(ends) >= steps else self.tokens[number]


def _score(question: GradedQuestion, number: int) -> Worth:
    return running_scores(question.step_scores[number] or []), float(question.scores[number])


def _log_prob(question: GradedQuestion, number: int) -> Worth:
    log_probs, ends = (question.step_log_probs or [])[number], (question.step_ends or [])[number]
    sums = np.cumsum(log_probs[:-1] if log_probs else [])
    return np.exp(sums / np.array(ends or [])).tolist(), math.exp(question.mean_log_probs[number])


def _last_step(question: GradedQuestion, number: int) -> Worth:
    steps = question.step_scores[number] or []
    return steps, steps[-1] if steps else 0.0


SIGNALS: dict[str, Callable[[GradedQuestion, int], Worth]] = {
    "score": _score,
    "log_prob": _log_prob,
    "last_step": _last_step,
}
"""What samples are judged by: the trajectory score, the geometric mean of the tokens' probabilities, or the last step's
score (the head as an outcome model)."""


def sampled_question(question: GradedQuestion, signal: str) -> SampledQuestion:
    """The graded samples, judged by a signal; what the service refused is worth 0."""
    question = question.graded()
    refused = question.is_refused
    numbers = range(len(question.correct))
    worth = [([], 0.0) if refused[number] else SIGNALS[signal](question, number) for number in numbers]
    return SampledQuestion(
        [Candidate(values, score, answer=key) for (values, score), key in zip(worth, question.keys, strict=True)],
        question.correct,
        [count or 0 for count in question.token_counts],
        [ends or [] for ends in question.step_ends or []],
    )


def possible_signals(questions: Sequence[GradedQuestion]) -> list[str]:
    """All of them, but for log-probs where a response has none."""
    known = all(
        (np.isfinite(question.mean_log_probs) | question.is_refused).all()
        and question.step_log_probs is not None
        and all(map(_is_known, question.step_log_probs, question.is_refused))
        for question in questions
    )
    return [signal for signal in SIGNALS if known or signal != "log_prob"]


def check_replayable(questions: Sequence[GradedQuestion], n: int, place: str) -> None:
    """Refuse what cannot be replayed.

    Raises:
        UserError: a question has fewer than n samples or none that could be graded, or nothing says where their steps
            end.
    """
    for question in questions:
        if len(question.correct) < n:
            raise UserError(
                f"--n {n}: {place} has {len(question.correct)} samples for the question {question.key[1][:60]!r}; "
                "choose a smaller one, or sample more"
            )
        if np.isnan(question.correct).all():
            raise UserError(f"{place}: no sample for the question {question.key[1][:60]!r} could be graded")
        told: list[Sequence[Any]] = [question.step_ends or [], question.step_scores, question.token_counts]
        if not all(len(each) == len(question.correct) for each in told) or not all(
            _is_known(value, refused) for each in told for value, refused in zip(each, question.is_refused, strict=True)
        ):
            raise UserError(
                f"{place}: does not say where the steps of each response end; sample again with --score_source fused "
                "from a policy service that returns scores"
            )


def _is_known(value: Any, refused: bool) -> bool:
    return value is not None or refused
