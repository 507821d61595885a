"""What both services share: life cycle, `/health`, `/ready`, `/metrics`, errors and limits."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fastapi import FastAPI, Request, Response, Security
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from xbai.engine import Completion
from xbai.model_identity import model_identity
from xbai.prompts import is_far_longer, prompt_text
from xbai.serve.bodies import BodyRoute
from xbai.serve.disconnect import client_gone, until_disconnected
from xbai.serve.errors import TOO_LONG, ServiceError, install_error_handlers
from xbai.serve.limits import RETRY_AFTER_S, Admission, Limits
from xbai.serve.model_thread import ModelThread
from xbai.serve.monitoring import PROMETHEUS_TEXT, Metrics, RequestMiddleware
from xbai.serve.schemas import ErrorResponse, StateResponse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

T = TypeVar("T")

ERRORS = {
    400: "unreadable",
    408: "the body did not arrive in time",
    413: "too long",
    422: "bad input",
    429: "the queue is full",
    500: "a bug",
    503: "not ready, or stopping",
    504: "out of time",
}
"""Statuses of a route besides success, and what each means."""
KEY_NEEDED = {401: "no, or not the right, API key"}
NOT_READY = {503: "not so"}
SILENCE_S = 15.0
"""After so much of it a stream shows that it is alive; proxies close connections that are silent for a minute."""


class Service:
    """One service's FastAPI app around a model thread.

    Args:
        title, model_name, thread, limits: what it is called, serves, runs and bears.
        routes: those that metrics name, beside the ones of every service.
        log_probs: it returns mean log-probs.
        open_routes: paths that ask for no key, beside `/health`.

    Attributes:
        app: the ASGI application; routes are added to it by `policy.py` and `score.py`.
    """

    def __init__(
        self,
        title: str,
        model_name: str,
        thread: ModelThread,
        limits: Limits,
        routes: Sequence[str],
        log_probs: bool,
        open_routes: Iterable[str] = (),
    ) -> None:
        self.thread = thread
        self.limits = limits
        self.admission = Admission(limits.max_pending)
        self.metrics = Metrics()
        accepted = "Responses or texts accepted, not yet answered"
        self.metrics.watch("xbai_queue_items", accepted, lambda: self.admission.pending)
        self._deadline: float | None = None
        self._model_name = model_name
        self._log_probs = log_probs
        self._identity = model_identity(model_name)
        # One worker: a fast tokenizer is not safe to encode with from several threads at once.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self.app = FastAPI(title=title, lifespan=self._lifespan)
        self.app.router.route_class = BodyRoute
        self.app.state.parsing = asyncio.Lock()
        self.app.state.service = self
        install_error_handlers(self.app)
        known = frozenset([*routes, "/health", "/ready", "/metrics"])
        self.app.add_middleware(
            RequestMiddleware,
            metrics=self.metrics,
            routes=known,
            limits=limits,
            open_routes=frozenset(["/health", *open_routes]),
        )
        self._add_state_routes()

    def route(self, errors: Mapping[int, str] = ERRORS, body: type[BaseModel] = ErrorResponse) -> dict[str, Any]:
        """What the schema says of a route beside its answer: its errors, and the key where one is needed.

        The key itself is checked before a body is read, by the middleware.
        """
        needs_key = self.limits.api_key is not None
        answers = {**errors, **(KEY_NEEDED if needs_key else {})}
        keys = {"dependencies": [Security(HTTPBearer(auto_error=False))]} if needs_key else {}
        return {"responses": {status: {"model": body, "description": why} for status, why in answers.items()}, **keys}

    async def answer(self, request: Request, work: Awaitable[T]) -> T:
        """Await `work`; cancel it when the client goes away, its time is up, or the service ends.

        Raises:
            ServiceError: 504 after the request's time; 503 at the end; 499 (which nobody reads) after a disconnect.
        """
        task = asyncio.ensure_future(work)
        watcher = asyncio.create_task(until_disconnected(request.receive))
        first: set[asyncio.Future[Any]] = {task, watcher, self._end}
        try:
            await asyncio.wait(first, timeout=self.limits.request_timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if watcher.done():
                raise client_gone()
            if self._end.done():
                raise self._stopped()
            raise self._late()
        finally:
            task.cancel()
            watcher.cancel()

    async def follow(self, work: Callable[[Callable[[Any], None]], Awaitable[Any]]) -> AsyncIterator[Any]:
        """What `work` tells the function that it gets, and at last what it returns; None after each while of silence.

        To be iterated to its end, or closed, which cancels the work.

        Raises:
            ServiceError: 504 after the request's time; 503 at the end of the service; what the work raises.
        """
        told: asyncio.Queue[Any] = asyncio.Queue()
        task = asyncio.ensure_future(work(told.put_nowait))
        deadline = time.monotonic() + self.limits.request_timeout_s
        try:
            while not (task.done() and told.empty()):
                if self._end.done():
                    raise self._stopped()
                if (left := deadline - time.monotonic()) <= 0:
                    raise self._late()
                news = asyncio.ensure_future(told.get())
                first: set[asyncio.Future[Any]] = {news, task, self._end}
                await asyncio.wait(first, timeout=min(left, SILENCE_S), return_when=asyncio.FIRST_COMPLETED)
                if news.done():
                    yield news.result()
                    continue
                news.cancel()
                if not (task.done() or self._end.done()):
                    yield None
            yield task.result()
        finally:
            task.cancel()

    def count(self, request: Request, prompt_tokens: int, completions: Sequence[Completion], generated: int) -> None:
        """Put what a request has cost, and brought, into metrics and log."""
        request.state.log |= {"responses": len(completions), "prompt_tokens": prompt_tokens, "tokens": generated}
        self.metrics.prompt_tokens.inc(prompt_tokens)
        self.metrics.generated_tokens.inc(generated)
        for completion in completions:
            self.metrics.responses.labels(completion.finish_reason).inc()
            if (score := completion.score) is not None:
                self.metrics.scores.observe(score)

    def _late(self) -> ServiceError:
        return ServiceError(504, f"no answer within {self.limits.request_timeout_s:g} s")

    def _stopped(self) -> ServiceError:
        return ServiceError(503, "the service stopped before the answer", RETRY_AFTER_S)

    def stop(self) -> None:
        """Take no more work. What there is may go on for the shutdown time-out."""
        self.admission.closed = True
        self._deadline = time.monotonic() + self.limits.shutdown_timeout_s

    @property
    def stopping(self) -> bool:
        """`stop` was called."""
        return self._deadline is not None

    def finished(self) -> bool:
        """There is nothing more to serve: the model is dead, or the service stops and the last answer is made.

        To be called from the event loop. At the end of the shutdown time-out it refuses what is still unanswered.
        """
        if not self.thread.alive:
            return True
        if self.stopping and self.admission.pending and self._seconds_left() <= 0 and not self._end.done():
            self._end.set_result(None)
        return self.stopping and not self.admission.pending

    def _seconds_left(self) -> float:
        if self._deadline is None:
            return self.limits.shutdown_timeout_s
        return max(0.0, self._deadline - time.monotonic())

    async def encode(self, *texts: str) -> list[list[int]]:
        """Token ids of each text, without special tokens, computed off the event loop.

        Raises:
            ServiceError: 413 for a text that is far too long for the model, found out without encoding all of it.
        """
        tokenizer, max_tokens = self.thread.model.tokenizer, self.thread.model.max_model_len

        def encode_all() -> list[list[int]]:
            for text in texts:
                _refuse_far_too_long(text, max_tokens, tokenizer)
            return [_encode(text, tokenizer) for text in texts]

        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, encode_all)

    async def render(self, messages: Sequence[Any], field: str) -> str:
        """A conversation as a prompt, made off the event loop.

        Raises:
            UserError: malformed messages, or the chat template does not take them.
        """
        tokenizer = self.thread.model.tokenizer
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizing, prompt_text, tokenizer, messages, field)

    async def encode_prompt(self, field: str, prompt: str) -> list[int]:
        """Token ids of a prompt to write on.

        Raises:
            ServiceError: 413, naming the field that it comes from, where that leaves no room for a token.
        """
        (prompt_ids,) = await self.encode(prompt)
        if len(prompt_ids) >= (most := self.thread.model.max_model_len):
            refusal = f"{field}: {len(prompt_ids)} tokens leave no room in the model's {most}"
            raise ServiceError(413, refusal, code=TOO_LONG, param=field)
        return prompt_ids

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self._end = asyncio.get_running_loop().create_future()
        self.thread.start()
        yield
        # One that is being loaded cannot be interrupted, and a broken one might never end.
        if self.thread.ready and not await asyncio.to_thread(self.thread.stop, self._seconds_left()):
            logger.warning("the model thread did not end in time")
        self._tokenizing.shutdown(wait=False)

    def _state(self, status: Literal["alive", "ready"], has_key: bool = True) -> StateResponse:
        rule = self.thread.model.step_rule if self.thread.ready else None
        return StateResponse(
            status=status,
            model=self._model_name if has_key else Path(self._model_name).resolve().name,
            identity=self._identity,
            scores=rule is not None,
            lang=None if rule is None else rule.lang,
            log_probs=self._log_probs,
        )

    def _add_state_routes(self) -> None:
        @self.app.get("/health", responses={503: {"model": ErrorResponse, "description": NOT_READY[503]}})
        async def health(request: Request) -> StateResponse:
            """The process and its engine are alive (perhaps still loading). Without the key no path is told."""
            has_key = request.state.has_key
            if not self.thread.alive:
                raise ServiceError(503, "the engine is dead" + (f": {self.thread.error!r}" if has_key else ""))
            return self._state("alive", has_key)

        @self.app.get("/ready", **self.route(NOT_READY))
        async def ready() -> StateResponse:
            """The model is loaded and answers."""
            if self.stopping:
                raise ServiceError(503, "the service is stopping")
            self.thread.check_ready()
            return self._state("ready")

        @self.app.get("/metrics", response_class=Response, **self.route({}))
        async def metrics() -> Response:
            """Prometheus metrics."""
            return Response(self.metrics.render(), media_type=PROMETHEUS_TEXT)


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def _refuse_far_too_long(text: str, max_tokens: int, tokenizer: PreTrainedTokenizerBase) -> None:
    # Megabytes of text take seconds to encode, and a hundred times their size in memory. A window's tokens are as many
    # as these of the whole text, up to its edges; texts near the limit pass, and are counted exactly later.
    refusal = ServiceError(
        413, f"the text has more than {max_tokens} tokens, which is all that the model takes", code=TOO_LONG
    )
    if is_far_longer(text, max_tokens, tokenizer):
        raise refusal
    window = 16 * max_tokens
    tokens = 0
    for start in range(0, len(text) if len(text) > window else 0, window):
        tokens += len(_encode(text[start : start + window], tokenizer))
        if tokens > 2 * max_tokens:
            raise refusal
