"""The driver's progress: a live bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from xbai.infer.tally import Tally

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 10.0


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
        tally: how good they are.
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
        self._handlers: list[logging.StreamHandler] = []

    def __enter__(self) -> Progress:
        """Show the bar."""
        self._bar.start()
        if self._live:
            # Log lines go above the bar, by way of the stream that it has put in the place of stderr.
            self._handlers = [
                handler
                for handler in logging.getLogger().handlers
                if isinstance(handler, logging.StreamHandler) and handler.stream is sys.__stderr__
            ]
            self._send_logs_to(sys.stderr)
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the bar away and log the end state."""
        self._send_logs_to(sys.__stderr__)
        self._bar.stop()
        if self._new:
            self._log()

    def generated(self, tokens: int | None) -> None:
        """Count generated tokens, where their number is known."""
        self._tokens += tokens or 0

    def advance(self, samples: int = 1) -> None:
        """Count samples that now have all they will get."""
        self._done += samples
        self._new += samples
        self._bar.update(self._task, completed=self._done)
        if not self._live and time.monotonic() - self._logged > LOG_INTERVAL_S:
            self._log()

    def _send_logs_to(self, stream: object) -> None:
        for handler in self._handlers:
            handler.setStream(stream)

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
