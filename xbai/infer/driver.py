"""Keeps the services busy: responses are generated and scored, and each is kept as soon as it is there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xbai.client.pool import RequestFailedError, RequestTooLongError, ServicePool, ServiceUnavailableError
from xbai.client.wire import read_responses, read_score, score_request
from xbai.infer.progress import Progress
from xbai.infer.schedule import GenerationRequest, Schedule
from xbai.infer.store import ResultStore
from xbai.results.lines import REFUSED, Sample, SampleKey
from xbai.results.settings import request_seed

logger = logging.getLogger(__name__)

COLUMNS = ("finish_reasons", "token_counts", "scores", "step_scores", "mean_log_probs")


@dataclass(frozen=True)
class Services:
    """Where responses and scores come from.

    Attributes:
        policy: `POST /generate`.
        scorer: `POST /score`; None where the score service is not asked.
        fused: the policy service returns the scores.
        log_probs: the policy service returns mean log-probs.
        names_prompt: the score service is told where the prompt ends.
    """

    policy: ServicePool
    scorer: ServicePool | None
    fused: bool
    log_probs: bool = False
    names_prompt: bool = True


class Driver:
    """Generates and scores whole responses, all questions at once.

    Args:
        sampling: fields of every `/generate` request.
        seed: of the run.
        on_complete: called with each sample that has all it will get.

    Attributes:
        failed: samples that could not be had, though they were not refused.
    """

    def __init__(
        self,
        services: Services,
        store: ResultStore,
        progress: Progress,
        on_complete: Callable[[SampleKey], None],
        sampling: Mapping[str, Any],
        seed: int | None,
    ) -> None:
        self.failed = 0
        self._services = services
        self._store = store
        self._progress = progress
        self._on_complete = on_complete
        self._sampling = sampling
        self._seed = seed
        self._scorer_is_lost = False

    async def run(self, schedule: Schedule, prompts: Mapping[int, str]) -> None:
        """Score what an earlier run left unscored, and do what the schedule asks for, all at once."""
        self._prompts = prompts
        async with asyncio.TaskGroup() as self._tasks:
            if self._services.scorer is not None:
                self._scoring = asyncio.Semaphore(self._services.scorer.capacity)
                for key in self._store.unscored():
                    self._go_on(key)
            while schedule:
                await self._services.policy.room()
                self._tasks.create_task(self._generate(schedule.take(), schedule))
                await asyncio.sleep(0)  # It takes the room.
        if self._services.scorer is not None and (unscored := self._store.unscored()):
            logger.warning("%d scores could not be had; run the same command again to retry them", len(unscored))

    async def _generate(self, request: GenerationRequest, schedule: Schedule) -> None:
        started = time.monotonic()
        try:
            responses = await self._services.policy.post(
                self._payload(request), lambda body: read_responses(body, request.count, *COLUMNS), weight=request.count
            )
        except RequestTooLongError as error:
            logger.warning("question %d is refused: %s", request.question.index, error)
            self._store.add(*(Sample(*key, "", finish_reason=REFUSED, error=str(error)) for key in request.keys))
            for key in request.keys:
                self._complete(key)
            return
        except RequestFailedError as error:
            logger.warning("question %d, %d samples: %s", request.question.index, len(request.missing), error)
            self.failed += len(request.missing)
            return
        seconds = time.monotonic() - started
        schedule.finished(request, seconds)
        samples = list(_samples(request, responses, seconds))
        self._store.add(*samples)
        for sample in samples:
            self._progress.generated(sample.token_count)
            self._go_on(sample.key, is_scored=sample.score is not None)

    def _payload(self, request: GenerationRequest) -> dict[str, Any]:
        seed = request_seed(self._seed, request.question.index, request.first_sample)
        return {
            "prefix_prompt": request.question.prompt,
            "response_num": request.count,
            **({} if seed is None else {"seed": seed}),
            **({"return_scores": True} if self._services.fused else {}),
            **({"return_log_probs": True} if self._services.log_probs else {}),
            **self._sampling,
        }

    def _go_on(self, key: SampleKey, is_scored: bool = False) -> None:
        if is_scored or self._services.scorer is None:
            self._complete(key)
        else:
            self._tasks.create_task(self._score(key, self._services.scorer))

    async def _score(self, key: SampleKey, scorer: ServicePool) -> None:
        # Only keys wait here: the texts of a long backlog stay on the disk.
        async with self._scoring:
            if not self._scorer_is_lost:
                await self._ask_score(key, scorer)
        self._complete(key)

    async def _ask_score(self, key: SampleKey, scorer: ServicePool) -> None:
        request = score_request(self._prompts[key[0]], self._store.get(key).response, self._services.names_prompt)
        try:
            score = await scorer.post(request, read_score)
        except (RequestTooLongError, RequestFailedError) as error:
            logger.warning("question %d, sample %d has no score: %s", *key, error)
        except ServiceUnavailableError as error:
            if not self._scorer_is_lost:
                logger.warning("no more scores are asked for: %s", error)
            self._scorer_is_lost = True
        else:
            self._store.add_score(key, *score)

    def _complete(self, key: SampleKey) -> None:
        self._progress.advance()
        self._on_complete(key)


def _samples(request: GenerationRequest, responses: Sequence[tuple[Any, ...]], seconds: float) -> Iterator[Sample]:
    for sample in request.missing:
        text, reason, tokens, score, steps, mean_log_prob = responses[sample - request.first_sample]
        yield Sample(
            request.question.index,
            sample,
            response=text,
            finish_reason=reason,
            token_count=tokens,
            seconds=round(seconds, 3),
            score=score,
            step_scores=steps,
            mean_log_prob=mean_log_prob,
        )
