"""From the scores of its steps to that of a trajectory (arXiv 2507.01951, section 3.2), one at a time."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate


def _geometric(scores: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, scores)) / len(scores)) if min(scores) > 0 else 0.0


def _soft_min(scores: Sequence[float]) -> float:
    """The soft minimum -log(mean(exp(-x))) at temperature 1 of the steps' log-odds x, as a score.

    exp(-x) is 1/score - 1, so that this is the harmonic mean of the step scores, and their soft minimum in log space
    too. It lies between the lowest step and the geometric mean, and steps of equal score give that score.
    """
    return len(scores) / sum(1 / score for score in scores) if min(scores) > 0 else 0.0


def _lowest_third(scores: Sequence[float]) -> float:
    """Mean of the lowest third of the step scores, rounded down, at least one."""
    lowest = sorted(scores)[: max(1, len(scores) // 3)]
    return sum(lowest) / len(lowest)


AGGREGATIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "geometric": _geometric,
    "arithmetic": lambda scores: sum(scores) / len(scores),
    "product": math.prod,
    "lowest_third": _lowest_third,
    "soft_min": _soft_min,
    "min": min,
    "last": lambda scores: scores[-1],
}


def aggregate(step_scores: Sequence[float], how: str = "geometric") -> float:
    """Reduce one trajectory's step scores; 0.0 without steps. Ways other than `geometric` are for evaluation only."""
    return float(AGGREGATIONS[how](step_scores)) if step_scores else 0.0


def running_scores(step_scores: Sequence[float]) -> list[float]:
    """The trajectory score after each step: [k] is the geometric mean of the first k + 1 scores."""
    logs = accumulate(math.log(score) if score > 0 else -math.inf for score in step_scores)
    return [math.exp(total / count) for count, total in enumerate(logs, 1)]
