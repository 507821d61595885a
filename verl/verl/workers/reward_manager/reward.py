"""What grading a batch gives, and grades that are still under way."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xbai.grading import FAILURES, Grade

RIGHT_ABOVE = 0.5
"""A grade above this counts as a right answer: the label of the score head and of the pass rate."""

ACCURACY = "acc"
"""What a grader of one's own returns beside `score` to say itself whether the answer is right."""


@dataclass(frozen=True)
class Reward:
    """What grading a batch of B responses gave."""

    reward_tensor: Tensor
    """[B, R] float32: the reward on the last response token, 0 elsewhere and for responses without a grade."""
    correct: Tensor
    """[B] float32: 1 for a right answer, 0 for a wrong one or none."""
    graded: Tensor
    """[B] bool: False where the grader timed out, crashed, raised or gave no number."""
    reward_extra_info: dict[str, np.ndarray]
    """Per response: `grade` as the grader gave it (None without one), `penalty` subtracted from it, and what a custom
    function returned besides."""
    metrics: dict[str, float]
    """`reward/ungraded_{reason}`, `reward_extra/{name}` (means), `timing_s/reward` (from launch to the last grade) and
    `timing_s/reward_wait` (of that, how long somebody waited)."""


class PendingReward:
    """Grades that may still be under way.

    Args:
        futures: each of one grade, or of the grades of several responses.
        finish: makes the `Reward` of all grades, without its times.
    """

    def __init__(
        self, futures: Sequence[Future[Grade] | Future[list[Grade]]], finish: Callable[[list[Grade]], Reward]
    ) -> None:
        self._futures, self._finish = futures, finish
        self._start, self._last, self._waited_s = time.perf_counter(), 0.0, 0.0
        for future in futures:
            future.add_done_callback(self._note_time)

    def wait(self) -> None:
        """Return when every response is graded.

        Raises:
            UserError: of a grader that cannot grade this data at all (unknown data source, bad custom function).
        """
        start = time.perf_counter()
        for future in self._futures:
            future.result()
        self._waited_s += time.perf_counter() - start

    def grades(self) -> list[Grade]:
        """Wait for the grades; errors as of `wait`."""
        self.wait()
        results = [future.result() for future in self._futures]
        return [grade for each in results for grade in (each if isinstance(each, list) else [each])]

    def result(self) -> Reward:
        """Wait for the grades, and make of them what trains.

        Raises:
            UserError: as `wait`; also when batch after batch has no grade at all.
        """
        reward = self._finish(self.grades())
        seconds = (self._last or time.perf_counter()) - self._start
        reward.metrics.update({"timing_s/reward": seconds, "timing_s/reward_wait": self._waited_s})
        return reward

    def _note_time(self, _: Future) -> None:
        self._last = max(self._last, time.perf_counter())


def make_reward(
    grades: Sequence[Grade], response_mask: Tensor, penalty_of: Callable[[Tensor, Tensor], Tensor]
) -> Reward:
    """Place grades [B] on the last tokens of responses.

    Args:
        grades: of B responses.
        response_mask: [B, R].
        penalty_of: what to subtract, from lengths [B] and correctness [B].
    """
    graded = torch.tensor([grade.value is not None for grade in grades])
    values = torch.tensor([grade.value or 0.0 for grade in grades])
    correct = torch.tensor([float(_is_right(grade)) for grade in grades])
    lengths = response_mask.sum(-1)
    penalty = penalty_of(lengths, correct).masked_fill(~graded, 0.0)
    reward_tensor = torch.zeros(response_mask.shape)
    reward_tensor[torch.arange(len(grades)), (lengths - 1).clamp(min=0)] = values - penalty
    failures = Counter(grade.failure for grade in grades)
    metrics = {f"reward/ungraded_{reason}": float(failures[reason]) for reason in FAILURES}
    extras: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(name for grade in grades for name in grade.extras):
        extras[name] = np.array([grade.extras.get(name) for grade in grades], dtype=object)
        if numbers := [value for value in extras[name] if isinstance(value, bool | int | float)]:
            metrics[f"reward_extra/{name}"] = float(np.mean(numbers))
    known = {"grade": np.array([grade.value for grade in grades], dtype=object), "penalty": penalty.numpy()}
    return Reward(reward_tensor, correct, graded, {**extras, **known}, metrics)


def _is_right(grade: Grade) -> bool:
    if grade.value is None:
        return False
    return bool(grade.extras.get(ACCURACY, grade.value > RIGHT_ABOVE))
