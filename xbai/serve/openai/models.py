"""`GET /v1/models`: the model's names, one for each effort that clients may choose by."""

from __future__ import annotations

import time
from typing import Any

from xbai.serve.errors import ServiceError
from xbai.serve.openai.desk import Desk
from xbai.serve.openai.fields import described


def add_model_routes(desk: Desk) -> None:
    """Add them to the desk's service."""
    service, created = desk.service, int(time.time())

    def of(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "xbai"}

    @service.app.get("/v1/models", **described(service))
    async def models() -> dict[str, Any]:
        """What may be asked for."""
        return {"object": "list", "data": [of(name) for name in desk.model.names]}

    @service.app.get("/v1/models/{name}", **described(service))
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        if name not in desk.model.names:
            raise ServiceError(404, f"model {name!r:.200} is not served here", code="model_not_found", param="model")
        return of(name)
