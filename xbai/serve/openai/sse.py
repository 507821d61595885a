"""Server-sent events: how a stream of chunks is written, and what holds its places until its end."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

COMMENT = ": thinking\n\n"
"""Says that the connection is alive; clients leave it alone."""
DONE = "data: [DONE]\n\n"


def event(data: dict[str, Any], name: str | None = None) -> str:
    """One event."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n"


class EventStream(StreamingResponse):
    """A response of events. `release` is called at its end, however it ends, also before its first event."""

    def __init__(self, events: AsyncIterator[str], release: Callable[[], None]) -> None:
        # A proxy that gathers what it passes on would keep the first token until the last.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._release()
