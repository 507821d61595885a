"""Traces of a step's phases by torch.profiler, for `trainer.profile_steps`."""

from __future__ import annotations

import gzip
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.profiler import profile

from xbai.errors import UserError
from xbai.files import atomic_write, why_not_written

logger = logging.getLogger(__name__)

TRACED_S = 5.0
"""How long a phase is traced, and on to the end of what `tick` follows. Every operation and every kernel is an event of
the trace, and stays in memory until it is written: of a whole phase there may be gigabytes."""


class PhaseProfiler:
    """Writes a Chrome trace of each phase that this process runs while it is asked to."""

    def __init__(self) -> None:
        self._files: str | None = None
        self._seen: set[str] = set()
        self._running: profile | None = None
        self._until = 0.0

    def trace(self, files: str | None) -> None:
        """Trace what follows into files whose paths begin so, each phase the first time that it runs; None: no more."""
        self._files, self._seen = files, set()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside is a phase; one that fails leaves no trace."""
        if self._files is None or name in self._seen:
            yield
            return
        self._seen.add(name)
        self._running = profiler = profile()
        profiler.start()
        self._until = time.perf_counter() + TRACED_S
        try:
            yield
        finally:
            self._stop()
        _write(profiler, Path(f"{self._files}{name}.json.gz"))

    def tick(self) -> None:
        """A part of the phase is done, after which tracing may end: a micro-batch, an iteration of the engine."""
        if self._running is not None and time.perf_counter() >= self._until:
            self._stop()

    def _stop(self) -> None:
        if self._running is not None:
            self._running.stop()
            self._running = None


PHASE_PROFILER = PhaseProfiler()
"""Of this process, as torch's profiler is."""


def _write(profiler: profile, path: Path) -> None:
    try:
        with TemporaryDirectory() as folder:
            plain = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(plain))
            with plain.open("rb") as trace, atomic_write(path) as stream, gzip.open(stream, "wb") as packed:
                shutil.copyfileobj(trace, packed)
    except (OSError, UserError) as error:
        # The training is worth more than its trace.
        logger.warning("%s: no trace (%s)", path, why_not_written(error))
