"""Keeps the services busy: responses are generated and scored, and each is kept as soon as it is there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from xbai.client.pool import RequestFailedError, RequestTooLongError, ServicePool, ServiceUnavailableError
from xbai.client.wire import read_chosen, read_responses, read_score, score_request
from xbai.infer.options import RunOptions
from xbai.infer.progress import Progress
from xbai.infer.schedule import GenerationRequest, Schedule
from xbai.infer.store import ResultStore
from xbai.results.lines import NOT_CHOSEN, REFUSED, WITHOUT_SCORE, Sample, SampleKey
from xbai.results.settings import request_seed
from xbai.search.expander import StepSource
from xbai.search.strategy import search_response

logger = logging.getLogger(__name__)

COLUMNS = {
    "finish_reasons": "finish_reason",
    "token_counts": "token_count",
    "scores": "score",
    "step_scores": "step_scores",
    "mean_log_probs": "mean_log_prob",
    "step_ends": "step_ends",
    "step_log_probs": "step_log_probs",
}
"""What `POST /generate` returns beside the texts, each with the attribute of a `Sample` that it is."""

STEP_LOG_PROB_DIGITS = 4
"""Decimals of a step's log-prob that are kept: a response may have hundreds of steps."""


@dataclass(frozen=True)
class Services:
    """Where responses and scores come from.

    Attributes:
        policy: `POST /generate`.
        scorer: `POST /score`; None where the score service is not asked.
        fused: the policy service returns the scores.
        log_probs: the policy service returns mean log-probs.
        names_prompt: the score service is told where the prompt ends.
        budget: fields of a `/generate` request by which the service chooses itself.
    """

    policy: ServicePool
    scorer: ServicePool | None
    fused: bool
    log_probs: bool = False
    names_prompt: bool = True
    budget: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Driver:
    """Has samples made, of all questions at once: whole responses, or searches that choose after each step.

    Attributes:
        on_complete: called with each sample that has all it will get.
        failed: samples that could not be had, though they were not refused.
    """

    options: RunOptions
    services: Services
    store: ResultStore
    progress: Progress
    on_complete: Callable[[SampleKey], None]
    failed: int = 0
    _scorer_is_lost: bool = False

    async def run(self, schedule: Schedule, prompts: Mapping[int, str]) -> None:
        """Score what an earlier run left unscored, and do what the schedule asks for, all at once."""
        self._prompts, self._sampling = prompts, self.options.sampling()
        async with asyncio.TaskGroup() as self._tasks:
            if self.services.scorer is not None:
                self._scoring = asyncio.Semaphore(self.services.scorer.capacity)
                for key in self.store.unscored():
                    self._tasks.create_task(self._score(key, self.services.scorer))
            while schedule:
                await self.services.policy.room()
                self._tasks.create_task(self._generate(schedule.take(), schedule))
                await asyncio.sleep(0)  # It takes the room.
        if self.services.scorer is not None and (unscored := self.store.unscored()):
            logger.warning("%d scores could not be had; run the same command again to retry them", len(unscored))

    async def search(self, requests: Sequence[GenerationRequest], source_of: Callable[[str, int], StepSource]) -> None:
        """Do the search of each request, which asks for one sample, all at once as far as the services take it.

        What earlier searches ask for goes before that of later ones, which fill what is free: searches end one after
        the other, so that a run that is killed keeps most of its work.

        Args:
            source_of: what makes the steps of a prompt, by its turn.
        """
        async with asyncio.TaskGroup() as self._tasks:
            for ticket, request in enumerate(requests):
                self._tasks.create_task(self._search(request, source_of(request.question.prompt, ticket)))

    async def _generate(self, request: GenerationRequest, schedule: Schedule) -> None:
        with self._keeping_failures(request, f"{len(request.missing)} samples"):
            started = time.monotonic()
            responses = await self.services.policy.post(
                self._payload(request), lambda body: self._read(body, request.count), weight=request.count
            )
            seconds = time.monotonic() - started
            schedule.finished(request, seconds)
            known = {key: responses[key[1] - request.first_sample] for key in request.keys}
            self._keep([Sample(*key, seconds=round(seconds, 3), **response) for key, response in known.items()])

    def _read(self, body: bytes, count: int) -> list[dict[str, Any]]:
        """What is known of each response, by the attributes of a `Sample`."""
        chosen = None
        if "answer_once" in self.services.budget:
            chosen, rows = read_chosen(body, count, *COLUMNS)
        else:
            rows = read_responses(body, count, *COLUMNS)
        responses = [dict(zip(("response", *COLUMNS.values()), row, strict=True)) for row in rows]
        for number, response in enumerate(responses):
            if (log_probs := response["step_log_probs"]) is not None:
                response["step_log_probs"] = [round(log_prob, STEP_LOG_PROB_DIGITS) for log_prob in log_probs]
            if chosen not in (None, number) and response["finish_reason"] not in WITHOUT_SCORE:
                response["finish_reason"] = NOT_CHOSEN
        return responses

    async def _search(self, request: GenerationRequest, source: StepSource) -> None:
        options, (key,) = self.options, request.keys
        with self._keeping_failures(request, f"sample {request.first_sample}"):
            started = time.monotonic()
            path, spent = await search_response(
                options.search, source, options.max_tokens, request_seed(options.seed, *key)
            )
            sample = Sample(
                *key,
                response=path.text,
                finish_reason=path.finish_reason,
                token_count=spent,
                seconds=round(time.monotonic() - started, 3),
                score=path.score,
                step_scores=list(path.step_scores),
            )
            self._keep([sample])

    @contextmanager
    def _keeping_failures(self, request: GenerationRequest, what: str) -> Iterator[None]:
        try:
            yield
        except RequestTooLongError as error:
            logger.warning("question %d is refused: %s", request.question.index, error)
            self._keep([Sample(*key, "", finish_reason=REFUSED, error=str(error)) for key in request.keys])
        except RequestFailedError as error:
            logger.warning("question %d, %s: %s", request.question.index, what, error)
            self.failed += len(request.missing)

    def _keep(self, samples: Sequence[Sample]) -> None:
        self.store.add(*samples)
        for sample in samples:
            self.progress.generated(sample.token_count)
            is_done = sample.score is not None or sample.finish_reason in WITHOUT_SCORE
            if is_done or self.services.scorer is None:
                self._complete(sample.key)
            else:
                self._tasks.create_task(self._score(sample.key, self.services.scorer))

    def _payload(self, request: GenerationRequest) -> dict[str, Any]:
        seed = request_seed(self.options.seed, request.question.index, request.first_sample)
        return {
            "prefix_prompt": request.question.prompt,
            "response_num": request.count,
            **({} if seed is None else {"seed": seed}),
            **({"return_scores": True} if self.services.fused else {}),
            **({"return_log_probs": True} if self.services.log_probs else {}),
            **self.services.budget,
            **self._sampling,
        }

    async def _score(self, key: SampleKey, scorer: ServicePool) -> None:
        # Only keys wait here: the texts of a long backlog stay on the disk.
        async with self._scoring:
            if not self._scorer_is_lost:
                await self._ask_score(key, scorer)
        self._complete(key)

    async def _ask_score(self, key: SampleKey, scorer: ServicePool) -> None:
        request = score_request(self._prompts[key[0]], self.store.get(key).response, self.services.names_prompt)
        try:
            score = await scorer.post(request, read_score)
        except (RequestTooLongError, RequestFailedError) as error:
            logger.warning("question %d, sample %d has no score: %s", *key, error)
        except ServiceUnavailableError as error:
            if not self._scorer_is_lost:
                logger.warning("no more scores are asked for: %s", error)
            self._scorer_is_lost = True
        else:
            self.store.add_score(key, *score)

    def _complete(self, key: SampleKey) -> None:
        self.progress.advance()
        self.on_complete(key)
