"""Prometheus metrics of a service, and the ASGI layer that admits, measures, names and bounds every request."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xbai.api_key import authorization
from xbai.serve.errors import ServiceError
from xbai.serve.limits import RETRY_AFTER_S, Limits

logger = logging.getLogger(__name__)

LATENCY_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)
SCORE_BUCKETS = tuple(i / 10 for i in range(1, 11))
UNKNOWN_ROUTE = "other"
PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)


class Metrics:
    """One service's counters, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("xbai_requests", "Requests answered", ["route", "status"], registry=registry)
        self.latency = Histogram(
            "xbai_request_seconds", "Time to the answer", ["route"], buckets=LATENCY_BUCKETS_S, registry=registry
        )
        self.prompt_tokens = Counter("xbai_prompt_tokens", "Tokens read", registry=registry)
        self.generated_tokens = Counter("xbai_generated_tokens", "Tokens generated", registry=registry)
        ended = "Responses generated, by why they ended"
        self.responses = Counter("xbai_responses", ended, ["finish_reason"], registry=registry)
        self.scores = Histogram("xbai_scores", "Trajectory scores", buckets=SCORE_BUCKETS, registry=registry)

    def watch(self, name: str, description: str, value: Callable[[], int]) -> None:
        """Add a gauge that is read whenever it is asked for."""
        Gauge(name, description, registry=self._registry).set_function(value)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)


class RequestMiddleware:
    """Asks for the key, bounds the bodies, gives every request an id (its own, or the client's), counts and logs it.

    Plain ASGI, because Starlette's function middleware hides a client's disconnect from the handler. What a handler
    puts into `request.state.log` is logged with the request; `request.state.has_key` tells the one of an open route
    whether it may say everything, and `request.state.request_id` is the id.

    Args:
        routes: those that metrics name.
        open_routes: paths that are answered without the key.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        routes: frozenset[str],
        limits: Limits,
        open_routes: frozenset[str],
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes
        self._open_routes = open_routes
        self._limits = limits
        self._bodies_bytes = 0
        self._authorization = authorization(limits.api_key).get("Authorization", "").encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = _header(scope, b"x-request-id").decode("latin-1")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        log: dict[str, int] = state.setdefault("log", {})
        has_key = state["has_key"] = self._has_key(scope)
        status: int | None = None

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            if not has_key and scope["path"] not in self._open_routes:
                raise ServiceError(401, "this service asks for its API key: Authorization: Bearer KEY")
            if int(_header(scope, b"content-length") or 0) > self._limits.max_body_bytes:
                raise self._too_large()
            with self._bounded(receive) as bounded:
                await self._app(scope, bounded, send_named)
        except ServiceError as error:
            await error.to_response(scope["path"])(scope, receive, send_named)
        except Exception as error:
            logger.exception("a bug", extra={"fields": {"request_id": request_id, "path": scope["path"]}})
            if status is None:
                detail = f"internal error ({type(error).__name__}); the service's log has more"
                await ServiceError(500, detail).to_response(scope["path"])(scope, receive, send_named)
        finally:
            self._record(scope, status or 500, time.perf_counter() - started, {"request_id": request_id}, log)

    def _has_key(self, scope: Scope) -> bool:
        given = _header(scope, b"authorization")
        return not self._authorization or hmac.compare_digest(given, self._authorization)

    @contextmanager
    def _bounded(self, receive: Receive) -> Iterator[Receive]:
        received = 0
        complete = False
        deadline = asyncio.get_running_loop().time() + self._limits.receive_timeout_s

        async def bounded() -> Message:
            nonlocal received, complete
            try:
                async with asyncio.timeout_at(None if complete else deadline):
                    message = await receive()
            except TimeoutError:
                seconds = self._limits.receive_timeout_s
                raise ServiceError(408, f"the request body did not arrive within {seconds:g} s") from None
            complete = not message.get("more_body", False)
            size = len(message.get("body", b""))
            received += size
            self._bodies_bytes += size
            if received > self._limits.max_body_bytes:
                raise self._too_large()
            if self._bodies_bytes > max(received, self._limits.max_bodies_bytes):
                raise ServiceError(429, "the requests at hand are as much as memory may hold", RETRY_AFTER_S)
            return message

        try:
            yield bounded
        finally:
            self._bodies_bytes -= received

    def _too_large(self) -> ServiceError:
        return ServiceError(413, f"the request body is larger than {self._limits.max_body_bytes} bytes")

    def _record(self, scope: Scope, status: int, seconds: float, name: dict[str, str], log: dict[str, int]) -> None:
        route = scope["path"] if scope["path"] in self._routes else UNKNOWN_ROUTE
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.latency.labels(route).observe(seconds)
        # Probes of /health and /ready, and files of the page, would drown the requests; their 503 is an answer too.
        probed = scope["method"] == "GET" and status in (200, 304, 503)
        level = logging.DEBUG if probed else logging.INFO
        fields = {**name, "route": route, "status": status, "seconds": round(seconds, 4), **log}
        logger.log(level, "request", extra={"fields": fields})


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")
