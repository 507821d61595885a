"""Every way of choosing among N candidates, what it achieves, and how much better it is than another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from xbai.aggregation import AGGREGATIONS
from xbai.measure.confidence import lowest_window, tail
from xbai.measure.estimators import Estimate, expected_best_of_n, expected_oracle, expected_vote, subset_masks
from xbai.measure.graded import GradedQuestion

Accuracies = dict[str, dict[int, np.ndarray]]
"""[questions], by strategy and N."""

Curves = dict[str, dict[int, Estimate]]
"""By strategy, or difference of two, and N."""

Signal = Callable[[GradedQuestion], np.ndarray]
"""Question -> a value [K] of each candidate, of which the highest is chosen; -inf where there is none."""

AtN = Callable[[int], float]
"""N -> probability that the choice among N candidates of one question is right."""

Strategy = Callable[[GradedQuestion], AtN]
"""A way of choosing: looks at a question once, whatever the N."""

AGGREGATED: dict[str, Signal] = {
    f"best_of_n_{how}": partial(GradedQuestion.scores_by, aggregation=how) for how in AGGREGATIONS if how != "geometric"
}
"""Other aggregations of the step scores than the geometric mean, which is `best_of_n`."""


def _combined(question: GradedQuestion) -> np.ndarray:
    if question.combined is None:
        raise ValueError("best_of_n_combined needs a calibration")
    return question.combined


def _confidence(
    measure: Callable[[Sequence[float], Sequence[int], int], float], question: GradedQuestion
) -> np.ndarray:
    values = np.full(len(question.correct), -np.inf)
    columns = (question.step_log_probs or (), question.step_ends or (), question.token_counts)
    for number, (log_probs, ends, tokens) in enumerate(zip(*columns, strict=False)):
        if log_probs is not None and ends is not None and tokens is not None:
            values[number] = measure(log_probs, ends, tokens)
    return values


SIGNALS: dict[str, Signal] = {
    "best_of_n": lambda question: question.scores,
    **AGGREGATED,
    "best_of_n_combined": _combined,
    "best_of_n_log_prob": lambda question: question.mean_log_probs,
    "best_of_n_lowest_window": partial(_confidence, lowest_window),
    "best_of_n_tail": partial(_confidence, tail),
    "shortest": lambda question: -question.tokens,
}
"""What the candidate with the highest of is chosen."""

FREE = ("best_of_n_log_prob", "best_of_n_lowest_window", "best_of_n_tail", "shortest")
"""Those that need no score."""


def _best_by(signal: Signal, question: GradedQuestion) -> AtN:
    values = signal(question)
    return lambda n: expected_best_of_n(values, question.correct, n)


def _vote(question: GradedQuestion, weights: np.ndarray | None = None) -> AtN:
    votes, correct = question.votes, question.correct
    return lambda n: expected_vote(votes, correct, subset_masks(len(correct), n), weights)


STRATEGIES: dict[str, Strategy] = {
    **{name: partial(_best_by, signal) for name, signal in SIGNALS.items()},
    "majority": _vote,
    "weighted_vote": lambda question: _vote(question, question.vote_weights),
    "oracle": lambda question: lambda n: expected_oracle(question.correct, n),
    "random": lambda question: lambda _: float(question.correct.mean()),
}


def possible_strategies(questions: Sequence[GradedQuestion]) -> list[str]:
    """The strategies for which the candidates have what it takes.

    Scores may be missing here and there (such a candidate comes last). Step scores must be there for each score, and
    log-probs and numbers of tokens for each response that the service did not refuse: a file that one service began
    without log-probs, and another extended with them, has none to choose by.
    """
    scored = any(np.isfinite(question.scores).any() for question in questions)
    with_steps = scored and all(
        steps is not None or not np.isfinite(score)
        for question in questions
        for steps, score in zip(question.step_scores, question.scores, strict=True)
    )
    free = {name: _are_known(questions, SIGNALS[name]) for name in FREE}
    calibrated = scored and free["best_of_n_log_prob"] and all(question.combined is not None for question in questions)
    answered = any(key is not None for question in questions for key in question.keys)
    possible = {
        "best_of_n": scored,
        **dict.fromkeys(AGGREGATED, with_steps),
        "best_of_n_combined": calibrated,
        **free,
        "majority": answered,
        "weighted_vote": answered and scored,
    }
    return [name for name in STRATEGIES if possible.get(name, True)]


def _are_known(questions: Sequence[GradedQuestion], signal: Signal) -> bool:
    known = [np.isfinite(signal(question)) for question in questions]
    return any(map(np.any, known)) and all(
        np.all(is_known | question.is_refused) for is_known, question in zip(known, questions, strict=True)
    )


def accuracies(questions: Sequence[GradedQuestion], strategies: Sequence[str], counts: Sequence[int]) -> Accuracies:
    """What each strategy achieves at each N.

    Where ungraded candidates leave a question fewer than N, its estimate is that of all it has. A question without any
    candidate is wrong.
    """
    graded = [question.graded() for question in questions]
    found = {}
    for name in strategies:
        choices = [(STRATEGIES[name](question), len(question.correct)) for question in graded]
        found[name] = {
            n: np.array([choice(min(n, samples)) if samples else 0.0 for choice, samples in choices]) for n in counts
        }
    return found


def candidate_counts(samples: int) -> list[int]:
    """The N to report for that many samples: powers of two, and all of them."""
    powers = [2**exponent for exponent in range(samples.bit_length())]
    return powers if powers[-1] == samples else [*powers, samples]


BASELINES = {
    "best_of_n": ("majority", "best_of_n_log_prob", "random"),
    "best_of_n_combined": ("best_of_n", "majority", "best_of_n_log_prob", "random"),
}
"""What a choice by the score is held against: what is free, and the score without log-prob."""

REFERENCE_N = 8
"""A choice that finds the errors of its score gets worse with more candidates than these."""


def paired_differences(found: Accuracies) -> Curves:
    """`one - other` at each N above 1, and `one - one at 8` above 8, of what was measured, paired by question."""
    curves: Curves = {}
    for name, baselines in BASELINES.items():
        ours = found.get(name, {})
        for baseline in filter(found.__contains__, baselines):
            theirs = found[baseline]
            curves[f"{name} - {baseline}"] = {n: Estimate.over(ours[n] - theirs[n]) for n in ours if n > 1}
        if REFERENCE_N in ours:
            at_reference = ours[REFERENCE_N]
            curves[f"{name} - {name} at {REFERENCE_N}"] = {
                n: Estimate.over(ours[n] - at_reference) for n in ours if n > REFERENCE_N
            }
    return {name: curve for name, curve in curves.items() if curve}
