"""The driver's other half: every sample is the outcome of a search that chooses after each step."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from xbai.client.pool import RequestFailedError, RequestTooLongError
from xbai.infer.progress import Progress
from xbai.infer.store import ResultStore
from xbai.results.lines import REFUSED, Sample, SampleKey, StoredQuestion
from xbai.results.settings import request_seed
from xbai.search.service_source import ServiceSource, StepServices
from xbai.search.strategy import search_response

if TYPE_CHECKING:
    from xbai.infer.options import RunOptions
    from xbai.infer.schedule import GenerationRequest

logger = logging.getLogger(__name__)


class StepSearchDriver:
    """Runs one search a sample, all at once, as far as the services take their requests.

    The requests of earlier searches go before those of later ones, which fill what is free: searches end one after the
    other, so that a run that is killed keeps most of its work.

    Attributes:
        failed: samples that could not be had, though they were not refused.
    """

    def __init__(
        self,
        options: RunOptions,
        store: ResultStore,
        services: StepServices,
        progress: Progress,
        on_complete: Callable[[SampleKey], None],
    ) -> None:
        self.failed = 0
        self._options = options
        self._store = store
        self._services = services
        self._progress = progress
        self._on_complete = on_complete

    async def run(self, requests: Sequence[GenerationRequest]) -> None:
        """Do the search of each request, which asks for one sample."""
        async with asyncio.TaskGroup() as tasks:
            for ticket, request in enumerate(requests):
                tasks.create_task(self._search(request.question, request.first_sample, ticket))

    async def _search(self, question: StoredQuestion, sample: int, ticket: int) -> None:
        source = ServiceSource(self._services, question.prompt, ticket)
        seed = request_seed(self._options.seed, question.index, sample)
        started = time.monotonic()
        try:
            path, spent = await search_response(self._options.search, source, self._options.max_tokens, seed)
        except RequestTooLongError as error:
            logger.warning("question %d is refused: %s", question.index, error)
            found = Sample(question.index, sample, "", finish_reason=REFUSED, error=str(error))
        except RequestFailedError as error:
            logger.warning("question %d, sample %d: %s", question.index, sample, error)
            self.failed += 1
            return
        else:
            found = Sample(
                question=question.index,
                sample=sample,
                response=path.text,
                finish_reason=path.finish_reason,
                token_count=spent,
                seconds=round(time.monotonic() - started, 3),
                score=path.score,
                step_scores=list(path.step_scores),
            )
        self._store.add(found)
        self._progress.generated(found.token_count)
        self._progress.advance()
        self._on_complete(found.key)
