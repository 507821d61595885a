"""The thread that owns an engine. Samples of all connections meet there and share its batches."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from xbai.engine import Completion, Engine, PromptTooLong, Sample, SamplingParams, Scorer
from xbai.errors import UserError
from xbai.serve.errors import TOO_LONG, ServiceError
from xbai.serve.scorer_thread import ScoringThread

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Items of requests of clients: the clients take turns, and so do the requests of each.

    A large request, or a client with many, must not keep the others waiting.
    """

    def __init__(self) -> None:
        self._clients: OrderedDict[str, OrderedDict[Hashable, deque[Item]]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def put(self, client: str, request: Hashable, items: Iterable[Item]) -> None:
        """Add a request that the queue does not hold; its items, one at least, come out in order."""
        waiting = deque(items)
        self._clients.setdefault(client, OrderedDict())[request] = waiting
        self._length += len(waiting)

    def get(self) -> Item:
        """Take the next item; the queue must not be empty."""
        client, requests = self._clients.popitem(last=False)
        request, items = requests.popitem(last=False)
        item = items.popleft()
        self._length -= 1
        if items:
            requests[request] = items
        if requests:
            self._clients[client] = requests
        return item

    def remove(self, client: str, request: Hashable) -> None:
        """Drop what is left of a request, if anything."""
        requests = self._clients.get(client, OrderedDict())
        self._length -= len(requests.pop(request, ()))
        if not requests:
            self._clients.pop(client, None)


AfterStep = Callable[[Engine, Mapping[Sample, Completion]], Mapping[Sample, Completion]]
"""Engine and finished samples of a request -> those that are given up, with what is left of each."""


@dataclass(eq=False)
class _Request:
    """Somebody waits for the completions of all `samples`, of which `after_step` may give up some."""

    client: str
    samples: list[Sample]
    after_step: AfterStep | None = None
    completions: dict[Sample, Completion] = field(default_factory=dict)
    future: Future[list[Completion]] = field(default_factory=Future)


class EngineThread(ScoringThread[Engine]):
    """Continuous batching: samples join the running batch as places get free, the clients by turns.

    The engine runs in this process, beside the event loop that answers HTTP, and not behind vLLM's `AsyncLLM`. The same
    scheduler and workers are behind both; what the other one's process would spare is the event loop's share of the
    interpreter lock, which is taken once a request (not once a token: nothing is passed on before a request is
    finished, save to those who read along), and the GPU works on meanwhile, because vLLM schedules a step ahead of it.

    Between steps it scores what it is asked to, a batch at a time.

    Attributes:
        queue: samples that the engine has not been given yet.
        begun: those that it is at.
    """

    def __init__(self, load: Callable[[], Engine]) -> None:
        super().__init__("engine", load)
        self._abandoned: list[_Request] = []
        self.queue: FairQueue[tuple[_Request, Sample]] = FairQueue()
        self.begun: dict[Sample, _Request] = {}

    def samples(self, prompt_ids: list[int], params: SamplingParams, return_scores: bool = False) -> list[Sample]:
        """The `params.n` samples of a request.

        Raises:
            ServiceError: 503 when the engine is not, or no longer, at work; 413 or 422 when it refuses the request.
        """
        try:
            return self.model.samples(prompt_ids, params, return_scores)
        except UserError as error:
            if isinstance(error, PromptTooLong):
                raise ServiceError(413, str(error), code=TOO_LONG) from None
            raise ServiceError(422, str(error)) from None

    async def complete(
        self, samples: list[Sample], client: str = "", after_step: AfterStep | None = None
    ) -> list[Completion]:
        """The completions of the samples. Cancelling the awaiting task aborts the work.

        Args:
            client: whose turn it takes.
            after_step: called on this thread, after every step of the engine.

        Raises:
            ServiceError: 503 when the engine is not, or no longer, at work; 422 when it refuses a sample.
        """
        request = _Request(client, samples, after_step)
        with self._changed:
            self._expect(request.future)
            self.queue.put(client, request, ((request, sample) for sample in samples))
            self._changed.notify()
        try:
            return await asyncio.wrap_future(request.future)
        except asyncio.CancelledError:
            with self._changed:
                self._abandoned.append(request)
                self._changed.notify()
            raise

    def _has_work(self) -> bool:
        return bool(self.queue or self.begun or self._abandoned or self.to_score)

    def _work(self, model: Engine) -> None:
        with self._changed:
            abandoned, self._abandoned = self._abandoned, []
        for request in abandoned:
            self._abort(model, request)
        if self.to_score:
            self._score(model)
        self._fill(model)
        if not self.begun:
            return
        watched = {request: after for request in self.begun.values() if (after := request.after_step) is not None}
        advanced = dict.fromkeys(watched)
        for sample, completion in model.step():
            request = self.begun.pop(sample)
            request.completions[sample] = completion
            advanced[request] = None
        for request, after_step in watched.items():
            pruned = after_step(model, request.completions)
            model.abort(sample for sample in pruned if self.begun.pop(sample, None) is not None)
            request.completions |= pruned
        for request in advanced:
            if len(request.completions) == len(request.samples):
                self._answer(request.future, [request.completions[sample] for sample in request.samples])

    def _fill(self, engine: Engine) -> None:
        """Give the engine as many samples as it works on at once."""
        while len(self.begun) < engine.max_num_seqs:
            with self._changed:
                if not self.queue:
                    return
                request, sample = self.queue.get()
            try:
                engine.add(sample)
            except UserError as error:
                self._answer(request.future, ServiceError(422, str(error)))
                self._abort(engine, request)
            else:
                self.begun[sample] = request

    def _abort(self, engine: Engine, request: _Request) -> None:
        with self._changed:
            self.queue.remove(request.client, request)
        engine.abort(sample for sample in request.samples if self.begun.pop(sample, None) is not None)

    def _scorer(self, model: Engine) -> Scorer:
        return model.require_scorer()

    def _watch(self, model: Engine) -> None:
        def on_failure() -> None:
            if not self._stopping:
                self.fail(RuntimeError("a worker process of the engine died"))

        model.watch(on_failure)

    def _close(self, model: Engine) -> None:
        model.close()
