"""The driver's progress, and how good the results are so far: a live bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections import defaultdict
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from xbai.logs import StderrHandler
from xbai.results.lines import SampleKey
from xbai.search.choice import best_candidate

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 10.0


class Tally:
    """Accuracy of the samples graded so far, and of the best of each `best_of` of a question, by score.

    Attributes:
        best_of: candidates among which the score chooses.
        graded: samples that have a grade.
    """

    def __init__(self, best_of: int = 1) -> None:
        self.best_of = best_of
        self.graded = 0
        self._correct = 0.0
        self._groups: defaultdict[tuple[int, int], list[tuple[float | None, float | None]]] = defaultdict(list)
        self._chosen: list[float] = []

    def add(self, key: SampleKey, score: float | None, grade: float | None) -> None:
        """Count one sample; a grade of None is none."""
        if grade is not None:
            self.graded += 1
            self._correct += grade
        if self.best_of == 1:
            return
        name = key[0], key[1] // self.best_of
        group = self._groups[name]
        group.append((score, grade))
        if len(group) == self.best_of:
            candidates = [(score, grade) for score, grade in self._groups.pop(name) if None not in (score, grade)]
            if candidates:
                scores, grades = zip(*candidates, strict=True)
                self._chosen.append(grades[best_candidate(list(scores))])

    @property
    def accuracy(self) -> float | None:
        """Share of right samples; None before the first grade."""
        return self._correct / self.graded if self.graded else None

    @property
    def best_of_n(self) -> float | None:
        """Share of groups whose best sample is right; None before the first group."""
        return sum(self._chosen) / len(self._chosen) if self._chosen else None

    def __str__(self) -> str:
        """Both in words, as far as they are known."""
        if self.accuracy is None:
            return ""
        best = "" if self.best_of_n is None else f", best of {self.best_of}: {self.best_of_n:.1%}"
        return f"accuracy {self.accuracy:.1%}{best}"


class _LiveColumn(ProgressColumn):
    """A text that is made anew whenever the bar is drawn."""

    def __init__(self, text: Callable[[], str]) -> None:
        super().__init__()
        self._text = text

    def render(self, task: Task) -> Text:
        return Text(self._text())


class Progress:
    """Counts finished samples and generated tokens.

    Args:
        total: samples of the whole run.
        done: samples that were there before.
    """

    def __init__(self, total: int, done: int, tally: Tally) -> None:
        self._total = total
        self._done = done
        self._tally = tally
        self._new = 0
        self._tokens = 0
        self._started = self._logged = time.monotonic()
        console = Console(stderr=True)
        self._live = console.is_terminal
        self._bar = RichProgress(
            TextColumn("samples"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            _LiveColumn(self._rate),
            _LiveColumn(tally.__str__),
            _LiveColumn(self._time_left),
            console=console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("samples", total=total, completed=done)
        self._handlers = logging.getLogger().handlers

    def __enter__(self) -> Progress:
        self._bar.start()
        if self._live:
            logging.getLogger().handlers = [_above_bar(handler) for handler in self._handlers]
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the bar away and log the end state."""
        logging.getLogger().handlers = self._handlers
        self._bar.stop()
        if self._new:
            self._log()

    def generated(self, tokens: int | None) -> None:
        """Count generated tokens, where their number is known."""
        self._tokens += tokens or 0

    def advance(self) -> None:
        """Count a sample that now has all it will get."""
        self._done += 1
        self._new += 1
        self._bar.update(self._task, completed=self._done)
        if not self._live and time.monotonic() - self._logged > LOG_INTERVAL_S:
            self._log()

    def _seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-6)

    def _rate(self) -> str:
        return f"{self._tokens / self._seconds():,.0f} tokens/s"

    def _time_left(self) -> str:
        if not self._new:
            return ""
        seconds = round((self._total - self._done) * self._seconds() / self._new)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"

    def _log(self) -> None:
        self._logged = time.monotonic()
        parts = (f"{self._done} of {self._total} samples", self._rate(), str(self._tally), self._time_left())
        logger.info(", ".join(part for part in parts if part))


def _above_bar(handler: logging.Handler) -> logging.Handler:
    """Log lines for a terminal go by way of the stream that the bar has put in the place of stderr."""
    if not isinstance(handler, StderrHandler):
        return handler
    above = logging.StreamHandler(sys.stderr)
    above.setFormatter(handler.formatter)
    return above
