"""When a class that counts nothing is said, and in a fine-tuning that starts from a one-sided head."""

from __future__ import annotations

import logging

import pytest

from verl.trainer.score_watch import PATIENCE, REPEAT_EVERY, UncountedClassWatch
from xbai.sprm import StepCounts

STEPS = StepCounts(20, 30)


def updates_that_warn(counted: list[StepCounts], steps: StepCounts, caplog: pytest.LogCaptureFixture) -> list[int]:
    watch, found = UncountedClassWatch("score"), []
    for number, one in enumerate(counted, start=1):
        caplog.clear()
        watch.observe(one, steps)
        found += [number] * len(caplog.messages)
    return found


def test_a_class_that_counts_nothing_is_said_after_a_while_and_then_seldom(caplog):
    found = updates_that_warn([StepCounts(7, 0)] * 120, STEPS, caplog)
    assert found == [PATIENCE, PATIENCE + REPEAT_EVERY, PATIENCE + 2 * REPEAT_EVERY]


def test_what_the_warning_says(caplog):
    watch = UncountedClassWatch("actor_rollout_ref.score")
    with caplog.at_level(logging.WARNING):
        for _ in range(PATIENCE):
            watch.observe(StepCounts(0, 9), STEPS)
    assert "for 5 updates no step of a right answer counted" in caplog.text
    assert "the head puts all of them below 0.5" in caplog.text
    assert "actor_rollout_ref.score.agreement_weighting=false" in caplog.text


@pytest.mark.parametrize(
    ("counted", "steps"),
    [
        ([StepCounts(5, 7)] * 20, STEPS),
        ([*[StepCounts(0, 7)] * (PATIENCE - 1), StepCounts(1, 7)] * 5, STEPS),
        ([StepCounts(0, 7)] * 20, StepCounts(0, 30)),
    ],
    ids=["healthy", "now and then", "no right answer"],
)
def test_no_false_alarm(counted, steps, caplog):
    assert updates_that_warn(counted, steps, caplog) == []


def test_a_batch_without_the_class_neither_counts_nor_clears(caplog):
    watch = UncountedClassWatch("score")
    for _ in range(PATIENCE - 1):
        watch.observe(StepCounts(0, 9), STEPS)
    watch.observe(StepCounts(0, 9), StepCounts(0, 9))
    assert not caplog.messages
    watch.observe(StepCounts(0, 9), STEPS)
    assert len(caplog.messages) == 1
