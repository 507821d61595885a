"""Grades for the accuracy so far, made beside the run without slowing it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from xbai.benchmarks.base import Benchmark, Question
from xbai.errors import UserError, first_error
from xbai.grading import GraderPool
from xbai.infer.progress import Tally
from xbai.infer.store import ResultStore
from xbai.results.lines import NOT_BEGUN, NOT_CHOSEN, PRUNED, SampleKey

logger = logging.getLogger(__name__)

CORES_PER_WORKER = 4
"""The services may be on the same machine."""


@dataclass
class RunningGrades:
    """Grades finished samples in killable processes. Only keys wait; the texts are read back from the store.

    Use as an async context manager, within which it works; what is not graded at its end stays so.
    """

    benchmark: Benchmark
    questions: Mapping[int, Question]
    store: ResultStore
    tally: Tally
    _waiting: asyncio.Queue[SampleKey] = field(default_factory=asyncio.Queue)

    async def __aenter__(self) -> RunningGrades:
        workers = max(1, (os.cpu_count() or 1) // CORES_PER_WORKER)
        self._pool = GraderPool(workers)
        self._working = asyncio.create_task(self._work_together(workers))
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._working.cancel()
        self._pool.kill()

    def add(self, key: SampleKey) -> None:
        """Grade a sample of the store some time."""
        self._waiting.put_nowait(key)

    async def settle(self, seconds: float) -> None:
        """Wait for the grades of all that was added, so long at most; not at all once grading has failed."""
        all_graded = asyncio.create_task(self._waiting.join())
        await asyncio.wait((all_graded, self._working), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        all_graded.cancel()

    async def _work_together(self, workers: int) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(self._work())
        except ExceptionGroup as failures:
            error = first_error(failures)
            # The samples are good without it, and `xbai metric` grades them again.
            logger.warning(
                "the accuracy so far is no longer known: %s",
                error,
                exc_info=None if isinstance(error, UserError) else error,
            )

    async def _work(self) -> None:
        while True:
            key = await self._waiting.get()
            sample = self.store.get(key)
            if sample.finish_reason in (PRUNED, NOT_BEGUN, NOT_CHOSEN):
                self.tally.add(key, None, None)
                self._waiting.task_done()
                continue
            request = self.benchmark.grade_request(self.questions[key[0]], sample.response)
            grade = await asyncio.wrap_future(self._pool.submit(request))
            self.tally.add(key, sample.score, grade.value)
            self._waiting.task_done()
