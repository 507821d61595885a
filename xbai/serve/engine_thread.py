"""The thread that owns an engine. Requests of all connections meet there and share its batches."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from xbai.engine import Completion, Engine, PromptTooLong, SamplingParams
from xbai.errors import UserError
from xbai.serve.errors import ServiceError
from xbai.serve.fair_queue import FairQueue
from xbai.serve.model_thread import ModelThread


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
