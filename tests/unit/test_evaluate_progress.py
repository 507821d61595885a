"""What a run says of itself while it goes on."""

from __future__ import annotations

import logging

import pytest

from xbai.infer import progress as progress_module
from xbai.infer.progress import Progress, Tally


def test_the_tally_takes_the_best_of_each_whole_group() -> None:
    tally = Tally(best_of=2)
    assert str(tally) == ""
    tally.add((0, 0), 0.9, 0.0)
    tally.add((0, 3), 0.8, 1.0)
    assert str(tally) == "accuracy 50.0%"
    tally.add((0, 1), 0.2, 1.0)
    tally.add((0, 2), 0.1, 0.0)
    assert str(tally) == "accuracy 50.0%, best of 2: 50.0%"
    tally.add((1, 0), None, 1.0)
    tally.add((1, 1), 0.3, None)
    assert (tally.graded, tally.best_of_n) == (5, 0.5), "no score and no grade: there is no best of these"


def test_elsewhere_than_on_a_terminal_lines_say_all_there_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "LOG_INTERVAL_S", 0.0)
    tally = Tally()
    tally.add((0, 0), None, 1.0)
    with caplog.at_level(logging.INFO), Progress(total=4, done=1, tally=tally) as progress:
        progress.generated(1000)
        progress.advance()
    line = caplog.messages[0]
    assert line.startswith("2 of 4 samples, ")
    assert "tokens/s, accuracy 100.0%, 0:00:0" in line
    assert line.endswith(" left")
