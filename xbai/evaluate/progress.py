"""The driver's progress: a live bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 10.0


class Progress:
    """Counts finished samples and generated tokens.

    Args:
        total: samples of the whole run.
        done: samples that were there before.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        self._total = total
        self._done = done
        self._new = 0
        self._tokens = 0
        self._started = self._logged = time.monotonic()
        console = Console(stderr=True)
        self._live = console.is_terminal
        self._bar = RichProgress(
            TextColumn("samples"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("samples", total=total, completed=done, rate="-")

    def __enter__(self) -> Progress:
        """Show the bar."""
        self._bar.start()
        if self._done:
            logger.info("%d of %d samples are there already", self._done, self._total)
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the bar away and log the end state."""
        self._bar.stop()
        if self._new:
            self._log()

    def advance(self, tokens: int | None) -> None:
        """Count one more sample."""
        self._done += 1
        self._new += 1
        self._tokens += tokens or 0
        self._bar.update(self._task, completed=self._done, rate=f"{self._tokens / self._seconds():,.0f}")
        if not self._live and time.monotonic() - self._logged > LOG_INTERVAL_S:
            self._log()

    def _seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-6)

    def _log(self) -> None:
        self._logged = time.monotonic()
        seconds = self._seconds()
        left = (self._total - self._done) * seconds / self._new
        logger.info(
            "%d of %d samples, %.0f tokens/s, about %.0f s left",
            self._done,
            self._total,
            self._tokens / seconds,
            left,
        )
