"""Rollouts that are sampled while the policy trains: in which order, by which weights, and what a lost engine ends."""

from __future__ import annotations

from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from verl.single_controller import WorkerLostError
from verl.trainer.ppo.one_step_off import OneStepOff

LAST = 3


class Rollouts:
    """Stands for the pool and the engines; sampling waits for `lets_go`."""

    def __init__(self, filled: int = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.filled, self.lets_go = filled, Event()
        self.lets_go.set()
        self.loss: WorkerLostError | None = None
        self.workers = None

    def update(self, metrics: dict[str, float]) -> None:
        self.calls.append(("update",))

    def is_filled(self, step: int) -> bool:
        return self.filled == step

    def fill(self, batches: Any, workers: Any, step: int, version: int) -> None:
        self.calls.append(("fill", step, version))
        assert self.lets_go.wait(60)
        if self.loss is not None:
            raise self.loss
        self.filled = step

    def take(self, step: int, metrics: dict[str, float]) -> int:
        assert self.is_filled(step)
        self.calls.append(("take", step))
        return step


class Group:
    """A worker group that notes why it was ended."""

    def __init__(self) -> None:
        self.loss: WorkerLostError | None = None
        self.processes = SimpleNamespace(abort=lambda loss: setattr(self, "loss", loss))


def test_each_step_begins_the_next_one_with_the_newest_weights() -> None:
    rollouts, metrics = Rollouts(), dict[str, float]()
    ahead = OneStepOff(rollouts, rollouts, [], LAST)
    for step in range(1, LAST + 1):
        begun = len(rollouts.calls)
        assert ahead.next(None, step, metrics) == step and metrics.pop("timing_s/rollout_wait") >= 0
        ahead.settle()
        first = [("update",), ("fill", 1, 1)] if step == 1 else []
        following = [("update",), ("fill", step + 1, step)] if step < LAST else []
        assert rollouts.calls[begun:] == [*first, ("take", step), *following]
    ahead.close()


def test_the_policy_does_not_wait_for_what_is_sampled_ahead() -> None:
    rollouts = Rollouts(filled=1)
    rollouts.lets_go.clear()
    ahead = OneStepOff(rollouts, rollouts, [], LAST)
    assert ahead.next(None, 1, {}) == 1 and rollouts.filled == 1
    rollouts.lets_go.set()
    ahead.settle()
    assert rollouts.filled == 2
    ahead.close()


def test_what_a_checkpoint_has_is_not_sampled_again() -> None:
    rollouts = Rollouts(filled=2)
    ahead = OneStepOff(rollouts, rollouts, [], LAST)
    ahead.next(None, 2, {})
    ahead.settle()
    assert rollouts.calls == [("take", 2), ("update",), ("fill", 3, 2)]
    ahead.close()


def test_a_lost_engine_ends_those_that_train() -> None:
    rollouts, groups = Rollouts(filled=1), [Group(), Group()]
    rollouts.loss = WorkerLostError("worker rank 0 of rollout was lost in proceed")
    ahead = OneStepOff(rollouts, rollouts, groups, LAST)
    ahead.next(None, 1, {})
    with pytest.raises(WorkerLostError, match="rank 0 of rollout"):
        ahead.settle()
    assert [group.loss for group in groups] == [rollouts.loss] * 2
    ahead.close()
