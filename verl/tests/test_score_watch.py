"""When a class that counts nothing is said, and in a fine-tuning that starts from a one-sided head."""

from __future__ import annotations

import logging

import pytest

from verl.trainer.score_watch import PATIENCE, REPEAT_EVERY, Classes, UncountedClassWatch

STEPS = Classes(20, 30)


def updates_that_warn(counted: list[Classes], steps: Classes, caplog: pytest.LogCaptureFixture) -> list[int]:
    watch, found = UncountedClassWatch("score"), []
    for number, one in enumerate(counted, start=1):
        caplog.clear()
        watch.observe(one, steps)
        found += [number] * len(caplog.messages)
    return found


def test_a_class_that_counts_nothing_is_said_after_a_while_and_then_seldom(caplog):
    found = updates_that_warn([Classes(7, 0)] * 120, STEPS, caplog)
    assert found == [PATIENCE, PATIENCE + REPEAT_EVERY, PATIENCE + 2 * REPEAT_EVERY]


def test_what_the_warning_says(caplog):
    watch = UncountedClassWatch("actor_rollout_ref.score")
    with caplog.at_level(logging.WARNING):
        for _ in range(PATIENCE):
            watch.observe(Classes(0, 9), STEPS)
    assert "for 5 updates no step of a right answer counted" in caplog.text
    assert "the head puts all of them below 0.5" in caplog.text
    assert "actor_rollout_ref.score.agreement_weighting=false" in caplog.text


@pytest.mark.parametrize(
    ("counted", "steps"),
    [
        ([Classes(5, 7)] * 20, STEPS),
        ([*[Classes(0, 7)] * (PATIENCE - 1), Classes(1, 7)] * 5, STEPS),
        ([Classes(0, 7)] * 20, Classes(0, 30)),
    ],
    ids=["healthy", "now and then", "no right answer"],
)
def test_no_false_alarm(counted, steps, caplog):
    assert updates_that_warn(counted, steps, caplog) == []


def test_a_batch_without_the_class_neither_counts_nor_clears(caplog):
    watch = UncountedClassWatch("score")
    for _ in range(PATIENCE - 1):
        watch.observe(Classes(0, 9), STEPS)
    watch.observe(Classes(0, 9), Classes(0, 9))
    assert not caplog.messages
    watch.observe(Classes(0, 9), STEPS)
    assert len(caplog.messages) == 1
