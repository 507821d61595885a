"""What both services share: life cycle, `/health`, `/ready`, `/metrics`, errors and limits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI, Response

from xbai.serve.engine_thread import ModelThread
from xbai.serve.errors import ServiceError, install_error_handlers
from xbai.serve.limits import Admission, Limits
from xbai.serve.monitoring import Metrics, RequestMiddleware
from xbai.serve.schemas import ErrorResponse, StateResponse

logger = logging.getLogger(__name__)

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
ERRORS = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "not JSON",
        413: "too long",
        422: "bad input",
        429: "the queue is full",
        503: "not ready",
        504: "out of time",
    }.items()
}


class Service:
    """One service's FastAPI app around a model thread.

    Attributes:
        app: the ASGI application; routes are added to it by `policy.py` and `score.py`.
        admission: the bounded queue.
        metrics: the Prometheus metrics.
    """

    def __init__(self, title: str, model_name: str, thread: ModelThread, limits: Limits, routes: list[str]) -> None:
        self.thread = thread
        self.limits = limits
        self.admission = Admission(limits.max_pending)
        self.metrics = Metrics(self.admission)
        self._model_name = model_name
        # One worker: a fast tokenizer is not safe to encode with from several threads at once.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self.app = FastAPI(title=title, lifespan=self._lifespan)
        install_error_handlers(self.app)
        known = frozenset([*routes, "/health", "/ready", "/metrics"])
        self.app.add_middleware(
            RequestMiddleware, metrics=self.metrics, routes=known, max_body_bytes=limits.max_body_bytes
        )
        self._add_state_routes()

    async def encode(self, *texts: str) -> list[list[int]]:
        """Token ids of each text, without special tokens, computed off the event loop."""
        tokenizer = self.thread.model.tokenizer

        def work() -> list[list[int]]:
            return [tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in texts]

        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.thread.start()
        yield
        ended = await asyncio.to_thread(self.thread.stop, self.limits.shutdown_timeout_s)
        if not ended:
            logger.warning("the model thread did not end within %d s", self.limits.shutdown_timeout_s)
        self._tokenizing.shutdown(wait=False)

    def _state(self, status: str) -> StateResponse:
        scores = self.thread.ready and self.thread.model.step_rule is not None
        return StateResponse(status=status, model=self._model_name, scores=scores)

    def _add_state_routes(self) -> None:
        @self.app.get("/health", responses={503: {"model": ErrorResponse}})
        async def health() -> StateResponse:
            """The process and its engine are alive (perhaps still loading)."""
            if not self.thread.alive:
                raise ServiceError(503, f"the engine is dead: {self.thread.error!r}")
            return self._state("alive")

        @self.app.get("/ready", responses={503: {"model": ErrorResponse}})
        async def ready() -> StateResponse:
            """The model is loaded and answers."""
            if not self.thread.ready:
                raise ServiceError(503, "the model is not loaded", retry_after_s=5)
            return self._state("ready")

        @self.app.get("/metrics", response_class=Response)
        async def metrics() -> Response:
            """Prometheus metrics."""
            return Response(self.metrics.render(), media_type=PROMETHEUS_TEXT)
