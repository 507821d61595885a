"""A thread that owns a model. Requests of all connections meet there and share its batches."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from xbai.engine import Completion, Engine, PromptTooLong, SamplingParams, Scored, Scorer
from xbai.errors import UserError
from xbai.serve.errors import ServiceError
from xbai.sprm import StepRule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Model = TypeVar("Model")


class ModelThread(ABC, Generic[Model]):
    """Loads a model in a thread of its own, which alone touches it from then on.

    Other threads put commands into its inbox and await futures. When loading or a command's work fails, the thread
    ends, every waiting future fails with 503, and `on_death` is called once.

    Attributes:
        error: why the thread died; None while it has not.
    """

    def __init__(self, name: str, load: Callable[[], Model]) -> None:
        self._load = load
        self._inbox: queue.SimpleQueue[Callable[[Model], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._model: Model | None = None
        self._stopping = False
        self.error: BaseException | None = None
        self.on_death: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Begin loading; `ready` turns true at the end of it."""
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End the thread after the work at hand and close the model; True when it ended within `timeout_s`."""
        self._inbox.put(self._stop)
        self._thread.join(timeout_s)
        return not self.running

    @property
    def running(self) -> bool:
        """The thread has not ended."""
        return self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Loading or serving."""
        return self.running and self.error is None

    @property
    def ready(self) -> bool:
        """The model is loaded and at work."""
        return self.alive and self._model is not None

    @property
    def model(self) -> Model:
        """The loaded model, for its read-only attributes (tokenizer, lengths).

        Raises:
            ServiceError: 503 when it is not loaded.
        """
        if not self.ready:
            raise ServiceError(503, "the model is not loaded", retry_after_s=5)
        return self._model

    def _stop(self, model: Model) -> None:
        self._stopping = True

    def _run(self) -> None:
        try:
            self._model = self._load()
            while not self._stopping:
                self._take_commands(self._model)
                self._work(self._model)
            self._close(self._model)
        except UserError as error:
            self.error = error
        except BaseException as error:
            logger.exception("the %s thread died", self._thread.name)
            self.error = error
        finally:
            self._fail_all(ServiceError(503, "the engine stopped"))
            if self.error is not None:
                self.on_death()

    def _take_commands(self, model: Model) -> None:
        block = self._idle(model)
        while True:
            try:
                command = self._inbox.get(block=block)
            except queue.Empty:
                return
            command(model)
            block = False

    @abstractmethod
    def _idle(self, model: Model) -> bool:
        """Whether there is nothing to do until a command comes."""

    @abstractmethod
    def _work(self, model: Model) -> None:
        """Advance the work at hand by one batch."""

    @abstractmethod
    def _fail_all(self, error: ServiceError) -> None:
        """Fail every waiting future."""

    def _close(self, model: Model) -> None:
        """Release the model; what still waits is failed afterwards."""


def _answer(future: Future, value: object) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(value)


def _refuse(future: Future, error: Exception) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)


class EngineThread(ModelThread[Engine]):
    """Continuous batching: requests join the running batch as they come; cancelled ones leave it."""

    def __init__(self, load: Callable[[], Engine]) -> None:
        super().__init__("engine", load)
        self._numbers = itertools.count()
        self._waiting: dict[str, Future[list[Completion]]] = {}
        self._lock = threading.Lock()

    async def generate(
        self, prompt_ids: list[int], params: SamplingParams, return_scores: bool = False
    ) -> list[Completion]:
        """Sample `params.n` responses. Cancelling the awaiting task aborts the work.

        Raises:
            ServiceError: 503 when the engine is not, or no longer, at work.
        """
        request_id = str(next(self._numbers))
        future: Future[list[Completion]] = Future()
        with self._lock:
            if not self.ready:
                raise ServiceError(503, "the model is not loaded", retry_after_s=5)
            self._waiting[request_id] = future
        self._inbox.put(lambda engine: self._add(engine, request_id, prompt_ids, params, return_scores))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self._inbox.put(lambda engine: self._abort(engine, request_id))
            raise

    def _add(
        self, engine: Engine, request_id: str, prompt_ids: list[int], params: SamplingParams, return_scores: bool
    ) -> None:
        if self._waiting[request_id].cancelled():
            del self._waiting[request_id]
            return
        try:
            engine.add_request(request_id, prompt_ids, params, return_scores)
        except UserError as error:
            status = 413 if isinstance(error, PromptTooLong) else 422
            _refuse(self._waiting.pop(request_id), ServiceError(status, str(error)))

    def _abort(self, engine: Engine, request_id: str) -> None:
        if self._waiting.pop(request_id, None) is not None:
            engine.abort(request_id)

    def _idle(self, model: Engine) -> bool:
        return not model.has_unfinished()

    def _work(self, model: Engine) -> None:
        if not model.has_unfinished():
            return
        for request_id, completions in model.step():
            _answer(self._waiting.pop(request_id), completions)

    def _fail_all(self, error: ServiceError) -> None:
        with self._lock:
            self._model = None
            waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            _refuse(future, error)

    def _close(self, model: Engine) -> None:
        model.close()


@dataclass(frozen=True)
class _ScoreJob:
    ids: list[int]
    response_start: int
    future: Future[Scored] = field(default_factory=Future)


@dataclass(frozen=True)
class ScoreModel:
    """A scorer with the tokenizer and the length limit that texts need."""

    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    max_model_len: int

    @property
    def step_rule(self) -> StepRule:
        """Which tokens end a step."""
        return self.scorer.step_rule


class ScorerThread(ModelThread[ScoreModel]):
    """Scores the sequences of concurrent requests together, those of like length in one padded batch."""

    def __init__(self, load: Callable[[], ScoreModel]) -> None:
        super().__init__("scorer", load)
        self._jobs: list[_ScoreJob] = []
        self._running: list[_ScoreJob] = []
        self._lock = threading.Lock()

    async def score(self, sequences: list[list[int]], response_starts: list[int]) -> list[Scored]:
        """Score sequences of token ids. Cancelling the awaiting task drops what has not begun.

        Raises:
            ServiceError: 503 when the scorer is not, or no longer, at work.
        """
        jobs = [_ScoreJob(ids, start) for ids, start in zip(sequences, response_starts, strict=True)]
        with self._lock:
            if not self.ready:
                raise ServiceError(503, "the model is not loaded", retry_after_s=5)
            self._jobs += jobs
        self._inbox.put(lambda model: None)
        return await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))

    def _idle(self, model: ScoreModel) -> bool:
        return not self._jobs

    def _work(self, model: ScoreModel) -> None:
        self._take_batch(model.scorer.max_batch_tokens)
        if not self._running:
            return
        scored = model.scorer.score([job.ids for job in self._running], [job.response_start for job in self._running])
        for job, result in zip(self._running, scored, strict=True):
            job.future.set_result(result)
        self._running = []

    def _take_batch(self, max_tokens: int) -> None:
        """Start the oldest job, so that none starves, with those nearest to it in length that fit the token budget."""
        with self._lock:
            waiting = [job for job in self._jobs if not job.future.cancelled()]
            by_nearness = sorted(waiting, key=lambda job: abs(len(job.ids) - len(waiting[0].ids)))
            batch: list[_ScoreJob] = []
            longest = 0
            for job in by_nearness:
                longest = max(longest, len(job.ids))
                if batch and longest * (len(batch) + 1) > max_tokens:
                    break
                batch.append(job)
            taken = set(map(id, batch))
            self._jobs = [job for job in waiting if id(job) not in taken]
            self._running = [job for job in batch if job.future.set_running_or_notify_cancel()]

    def _fail_all(self, error: ServiceError) -> None:
        with self._lock:
            self._model = None
            jobs, self._jobs = self._jobs, []
        for job in jobs:
            _refuse(job.future, error)
        for job in self._running:
            job.future.set_exception(error)
