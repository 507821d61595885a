"""Prometheus metrics of a service, and the ASGI layer that measures, names and bounds every request."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xbai.serve.errors import ServiceError
from xbai.serve.limits import Admission

logger = logging.getLogger(__name__)

LATENCY_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)
SCORE_BUCKETS = tuple(i / 10 for i in range(1, 11))
UNKNOWN_ROUTE = "other"


class Metrics:
    """One service's counters, in a registry of their own."""

    def __init__(self, admission: Admission) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("xbai_requests", "Requests answered", ["route", "status"], registry=self._registry)
        self.latency = Histogram(
            "xbai_request_seconds", "Time to the answer", ["route"], buckets=LATENCY_BUCKETS_S, registry=self._registry
        )
        self.prompt_tokens = Counter("xbai_prompt_tokens", "Tokens read", registry=self._registry)
        self.generated_tokens = Counter("xbai_generated_tokens", "Tokens generated", registry=self._registry)
        self.responses = Counter(
            "xbai_responses", "Responses generated, by why they ended", ["finish_reason"], registry=self._registry
        )
        self.scores = Histogram("xbai_scores", "Trajectory scores", buckets=SCORE_BUCKETS, registry=self._registry)
        pending = Gauge("xbai_queue_items", "Responses or texts accepted, not yet answered", registry=self._registry)
        pending.set_function(lambda: admission.pending)

    def observe_scores(self, values: Iterable[float]) -> None:
        """Count trajectory scores."""
        for value in values:
            self.scores.observe(value)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)


class RequestMiddleware:
    """Bounds the body, gives every request an id (its own, or the client's `X-Request-Id`), counts and logs it.

    Plain ASGI, because Starlette's function middleware hides a client's disconnect from the handler.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str], max_body_bytes: int) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event stream."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = _header(scope, b"x-request-id") or uuid.uuid4().hex
        status = 500

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", request_id.encode("latin-1")))
            await send(message)

        try:
            if int(_header(scope, b"content-length") or 0) > self._max_body_bytes:
                raise self._too_large()
            await self._app(scope, self._bounded(receive), send_named)
        except ServiceError as error:
            await error.to_response()(scope, receive, send_named)
        finally:
            self._record(scope, status, time.perf_counter() - started, request_id)

    def _bounded(self, receive: Receive) -> Receive:
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise self._too_large()
            return message

        return bounded

    def _too_large(self) -> ServiceError:
        return ServiceError(413, f"the request body is larger than {self._max_body_bytes} bytes")

    def _record(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        route = scope["path"] if scope["path"] in self._routes else UNKNOWN_ROUTE
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.latency.labels(route).observe(seconds)
        level = logging.DEBUG if scope["method"] == "GET" and status < 400 else logging.INFO
        logger.log(level, "request=%s route=%s status=%d seconds=%.3f", request_id, route, status, seconds)


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")
