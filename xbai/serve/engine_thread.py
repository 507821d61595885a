"""A thread that owns a model. Requests of all connections meet there and share its batches."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Generic, TypeVar

from xbai.engine import Completion, Engine, PromptTooLong, SamplingParams, Scored, Scorer
from xbai.errors import UserError
from xbai.serve.errors import ServiceError
from xbai.serve.fair_queue import FairQueue
from xbai.sprm import StepRule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Model = TypeVar("Model")


class ModelThread(ABC, Generic[Model]):
    """Loads a model in a thread of its own, which alone touches it from then on.

    Other threads put commands into its inbox and await futures. When loading or a command's work fails, the thread
    ends and every waiting future fails with 503.

    Attributes:
        error: why the model is dead; None while it is not.
        loading_error: why it could not be loaded, where that is the user's to mend.
    """

    def __init__(self, name: str, load: Callable[[], Model]) -> None:
        self._load = load
        self._inbox: queue.SimpleQueue[Callable[[Model], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._model: Model | None = None
        self._stopping = False
        self.error: BaseException | None = None
        self.loading_error: UserError | None = None

    def start(self) -> None:
        """Begin loading; `ready` turns true at the end of it."""
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End the thread after the work at hand and close the model; True when it ended within `timeout_s`."""
        self._inbox.put(self._stop)
        self._thread.join(timeout_s)
        return not self.running

    def fail(self, error: BaseException) -> None:
        """Take the model for dead, also where its thread hangs in it; callable from any thread."""
        self.error = self.error or error
        self._fail_all(ServiceError(503, "the engine stopped"))

    @property
    def running(self) -> bool:
        """The thread has not ended."""
        return self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Loading or serving."""
        return self.running and self.error is None

    @property
    def loading(self) -> bool:
        """The model is not loaded yet."""
        return self.alive and self._model is None

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
            try:
                model = self._load()
            except UserError as error:
                self.loading_error = error
                self.fail(error)
                return
            self._watch(model)
            self._model = model
            while not self._stopping:
                self._take_commands(model)
                self._work(model)
            self._close(model)
        except BaseException as error:
            logger.exception("the %s thread died", self._thread.name)
            self.fail(error)
        finally:
            self._fail_all(ServiceError(503, "the engine stopped"))

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

    def _watch(self, model: Model) -> None:
        """Call `fail` when a process that the model needs dies."""

    def _close(self, model: Model) -> None:
        """Release the model; what still waits is failed afterwards."""


def _refuse(future: Future, error: Exception) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)


@dataclass
class _Generation:
    """A request of `params.n` samples, each of which is a request to the engine."""

    request_id: str
    client: str
    prompt_ids: list[int]
    params: SamplingParams
    return_scores: bool
    future: Future[list[Completion]] = field(default_factory=Future)
    begun: set[int] = field(default_factory=set)
    completions: dict[int, Completion] = field(default_factory=dict)


class EngineThread(ModelThread[Engine]):
    """Continuous batching: samples join the running batch as places get free, the clients by turns.

    The engine runs in this process, beside the event loop that answers HTTP, and not behind vLLM's `AsyncLLM`. The same
    scheduler and workers are behind both; what the other one's process would spare is the event loop's share of the
    interpreter lock, which is taken once a request (not once a token: nothing is passed on before a request is
    finished), and the GPU works on meanwhile, because vLLM schedules a step ahead of it.
    """

    def __init__(self, load: Callable[[], Engine]) -> None:
        super().__init__("engine", load)
        self._numbers = itertools.count()
        self._requests: dict[str, _Generation] = {}
        self._queue: FairQueue[tuple[_Generation, int]] = FairQueue()
        self._begun: dict[str, tuple[_Generation, int]] = {}
        self._lock = threading.Lock()

    @property
    def samples_waiting(self) -> int:
        """Samples that the engine has not been given yet."""
        return len(self._queue)

    @property
    def samples_begun(self) -> int:
        """Samples that the engine is at."""
        return len(self._begun)

    async def generate(
        self, prompt_ids: list[int], params: SamplingParams, return_scores: bool = False, client: str = ""
    ) -> list[Completion]:
        """Sample `params.n` responses. Cancelling the awaiting task aborts the work. `client` is whose turn it takes.

        Raises:
            ServiceError: 503 when the engine is not, or no longer, at work; 413 or 422 when it refuses the request.
        """
        request = _Generation(str(next(self._numbers)), client, prompt_ids, params, return_scores)
        with self._lock:
            if not self.ready:
                raise ServiceError(503, "the model is not loaded", retry_after_s=5)
            self._requests[request.request_id] = request
        self._inbox.put(lambda engine: self._add(engine, request))
        try:
            return await asyncio.wrap_future(request.future)
        except asyncio.CancelledError:
            self._inbox.put(lambda engine: self._abort(engine, request))
            raise

    def _add(self, engine: Engine, request: _Generation) -> None:
        try:
            engine.check(request.prompt_ids, request.params, request.return_scores)
        except UserError as error:
            status = 413 if isinstance(error, PromptTooLong) else 422
            self._finish(request, ServiceError(status, str(error)))
        else:
            numbers = range(request.params.n)
            self._queue.put(request.client, request.request_id, ((request, number) for number in numbers))

    def _abort(self, engine: Engine, request: _Generation) -> None:
        self._requests.pop(request.request_id, None)
        self._queue.remove(request.client, request.request_id)
        for number in request.begun - request.completions.keys():
            key = f"{request.request_id}/{number}"
            engine.abort(key)
            # A client may leave a request that has been refused meanwhile, and so is aborted already.
            self._begun.pop(key, None)

    def _idle(self, model: Engine) -> bool:
        return not (self._queue or self._begun)

    def _work(self, model: Engine) -> None:
        while self._queue and len(self._begun) < model.max_num_seqs:
            self._begin(model, *self._queue.get())
        if not self._begun:
            return
        for key, [completion] in model.step():
            request, number = self._begun.pop(key)
            request.completions[number] = completion
            if len(request.completions) == request.params.n:
                self._finish(request, [request.completions[number] for number in range(request.params.n)])

    def _begin(self, engine: Engine, request: _Generation, number: int) -> None:
        key = f"{request.request_id}/{number}"
        one = replace(request.params, n=1, first=number)
        try:
            engine.add_request(key, request.prompt_ids, one, request.return_scores)
        except UserError as error:
            # `check` passed it, but vLLM has rules of its own.
            self._finish(request, ServiceError(422, str(error)))
            self._abort(engine, request)
            return
        request.begun.add(number)
        self._begun[key] = request, number

    def _finish(self, request: _Generation, answer: list[Completion] | ServiceError) -> None:
        with self._lock:
            waited_for = self._requests.pop(request.request_id, None)
        if waited_for is None or not request.future.set_running_or_notify_cancel():
            return
        if isinstance(answer, ServiceError):
            request.future.set_exception(answer)
        else:
            request.future.set_result(answer)

    def _fail_all(self, error: ServiceError) -> None:
        with self._lock:
            self._model = None
            waiting = list(self._requests.values())
        for request in waiting:
            self._finish(request, error)

    def _watch(self, model: Engine) -> None:
        def on_failure() -> None:
            if not self._stopping:
                self.fail(RuntimeError("a worker process of the engine died"))

        model.watch(on_failure)

    def _close(self, model: Engine) -> None:
        model.close()


@dataclass(frozen=True, eq=False)
class _ScoreJob:
    ids: list[int]
    response_start: int
    turn: int
    """Jobs begin in the order of this."""
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
    """Scores the sequences of concurrent requests together: what comes while a batch runs forms the next ones.

    A sequence lets work that comes later pass by, up to its own tokens times those of its client that are unfinished.
    So short sequences need not wait for long ones, nor those of one client for the many of another, and none starves.
    """

    def __init__(self, load: Callable[[], ScoreModel]) -> None:
        super().__init__("scorer", load)
        self._jobs: list[_ScoreJob] = []
        self._unfinished: Counter[str] = Counter()
        self._tokens_begun = 0
        self._lock = threading.Lock()

    async def score(
        self, sequences: Sequence[list[int]], response_starts: Sequence[int], client: str = ""
    ) -> list[Scored]:
        """Score sequences of a client's token ids. Cancelling the awaiting task drops what has not begun.

        Raises:
            ServiceError: 503 when the scorer is not, or no longer, at work.
        """
        others = itertools.count(self._unfinished[client] + 1)
        jobs = [
            _ScoreJob(ids, start, self._tokens_begun + len(ids) * number)
            for ids, start, number in zip(sequences, response_starts, others, strict=False)
        ]
        with self._lock:
            if not self.ready:
                raise ServiceError(503, "the model is not loaded", retry_after_s=5)
            self._jobs += jobs
        self._inbox.put(lambda model: None)
        self._unfinished[client] += len(jobs)
        try:
            return await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
        finally:
            self._unfinished -= Counter({client: len(jobs)})

    def _idle(self, model: ScoreModel) -> bool:
        return not self._jobs

    def _work(self, model: ScoreModel) -> None:
        with self._lock:
            self._jobs = [job for job in self._jobs if not job.future.cancelled()]
            waiting = sorted(self._jobs, key=lambda job: job.turn)
        batch = model.scorer.new_batch()
        running = list(itertools.takewhile(lambda job: batch.add(job.ids, job.response_start), waiting))
        self._tokens_begun += sum(len(job.ids) for job in running)
        results = dict(zip(running, model.scorer.run(batch), strict=True))
        with self._lock:
            # None is left of them where `fail` has been called meanwhile.
            answered = [job for job in self._jobs if job in results]
            self._jobs = [job for job in self._jobs if job not in results]
        for job in answered:
            if job.future.set_running_or_notify_cancel():
                job.future.set_result(results[job])

    def _fail_all(self, error: ServiceError) -> None:
        with self._lock:
            self._model = None
            jobs, self._jobs = self._jobs, []
        for job in jobs:
            _refuse(job.future, error)
