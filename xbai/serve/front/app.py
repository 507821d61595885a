"""The ASGI application in front of several copies of a policy service."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import httpx
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from xbai.client.replicas import Replica, Replicas
from xbai.serve.errors import ServiceError, install_error_handlers
from xbai.serve.front.metrics import gather_metrics
from xbai.serve.front.proxy import Proxy
from xbai.serve.limits import Admission, Limits
from xbai.serve.monitoring import PROMETHEUS_TEXT, Metrics, RequestMiddleware
from xbai.serve.page import PAGE_ROUTES, add_page

ROUTES = ("/generate", "/score", "/score_batch", "/v1/chat/completions", "/v1/responses", "/v1/models")
"""Those of the copies that metrics name. Their own modules import torch."""
STATE_ROUTES = ("/health", "/ready", "/metrics")
STATE_TIMEOUT_S = 10.0
FRONT = "front"
"""The `replica` of the front's own metrics."""


def create_front_app(
    replicas: Replicas,
    client: httpx.AsyncClient,
    limits: Limits,
    admission: Admission,
    metrics: Metrics,
    default_effort: str | None = None,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
    page: bool = True,
) -> FastAPI:
    """Answers itself for how it is; everything else is the copies' to answer.

    Args:
        replicas: those that are ready; they may change.
        client: has the API key.
        page: at `/` is the page.
    """

    async def health(request: Request) -> Response:
        """The front is alive, whatever its copies are."""
        return JSONResponse({"status": "alive", "replicas_ready": len(replicas.all)})

    async def ready(request: Request) -> Response:
        """What one ready copy answers: they all serve the same model."""
        with admission.admit(0):
            for replica in sorted(replicas.all, key=Replica.preference):
                answer = await _get(client, replica, "/ready")
                if answer is not None:
                    return Response(answer.content, media_type="application/json")
            raise ServiceError(503, "no copy of the model is ready")

    async def gathered(request: Request) -> Response:
        """Metrics of all copies."""
        asked = list(replicas.all)
        answers = await asyncio.gather(*(_get(client, replica, "/metrics") for replica in asked))
        of_copies = {one.name: answer.text for one, answer in zip(asked, answers, strict=True) if answer is not None}
        content = gather_metrics({**of_copies, FRONT: metrics.render().decode()})
        return Response(content, media_type=PROMETHEUS_TEXT)

    known = frozenset((*ROUTES, *STATE_ROUTES))
    own: list[BaseRoute] = [
        Route(path, answer) for path, answer in zip(STATE_ROUTES, (health, ready, gathered), strict=True)
    ]
    proxied = Route("/{path:path}", Proxy(replicas, client, admission, limits, default_effort))
    open_routes = frozenset(["/health", *(PAGE_ROUTES if page else ())])
    middleware = Middleware(RequestMiddleware, metrics=metrics, routes=known, limits=limits, open_routes=open_routes)
    # Schema and documentation are those of the copies.
    app = FastAPI(routes=own, middleware=[middleware], lifespan=lifespan, openapi_url=None)
    if page:
        add_page(app)
    app.router.routes.append(proxied)
    install_error_handlers(app)
    return app


async def _get(client: httpx.AsyncClient, replica: Replica, path: str) -> httpx.Response | None:
    """Its answer where that is a success."""
    try:
        answer = await client.get(replica.base_url + path, timeout=STATE_TIMEOUT_S)
    except httpx.TransportError:
        return None
    return answer if answer.is_success else None
