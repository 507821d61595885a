"""Request bodies as JSON: what a hostile one costs is bounded, and nobody waits while a large one is read."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from xbai.serve.errors import ServiceError
from xbai.serve.schemas import MAX_STOP_TOKENS

MAX_BODY_TOKENS = 2 * MAX_STOP_TOKENS
"""Strings, `[`, `{` and commas of a body: twice what the largest request that the schemas take has."""
MAX_BODY_KEYS = 128
"""Of the object that a body is; each unknown one would cost an error, which is costlier to make than a value."""
LARGE_BODY_BYTES = 64 << 10
"""From here on a body is parsed off the event loop."""

_DELIMITERS = b'"[{,'
# Possessive, so that neither a long string nor one without an end makes it go back.
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{,]', re.DOTALL)
# One at a time: what several large bodies need while they are parsed does not add up.
_PARSER = ThreadPoolExecutor(1, thread_name_prefix="parser")


def parse_body(body: bytes) -> Any:
    """What the JSON of a body says.

    Raises:
        ServiceError: 422 for more values than any request has, found out before one is made, and for deep nesting.
        json.JSONDecodeError: it is not JSON.
        UnicodeDecodeError: it is not text.
    """
    text = body.decode(json.detect_encoding(body), "surrogatepass")
    # Counting bytes, also those inside of strings, costs next to nothing and settles most bodies.
    at_most = len(body) - len(body.translate(None, _DELIMITERS))
    if at_most > MAX_BODY_TOKENS and _has_tokens(text, MAX_BODY_TOKENS + 1):
        raise ServiceError(422, f"body: more than {MAX_BODY_TOKENS} keys and values, which no request has")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ServiceError(422, "body: lists and objects are nested too deeply") from None
    if isinstance(value, dict) and len(value) > MAX_BODY_KEYS:
        raise ServiceError(422, f"body: more than {MAX_BODY_KEYS} keys, which no request has")
    return value


def _has_tokens(text: str, count: int) -> bool:
    return next(islice(_TOKEN.finditer(text), count - 1, None), None) is not None


class BodyRequest(Request):
    """A request whose body `parse_body` reads."""

    async def json(self) -> Any:
        """The parsed body; see `parse_body` for what it raises."""
        body = await self.body()
        if len(body) < LARGE_BODY_BYTES:
            return parse_body(body)
        return await asyncio.get_running_loop().run_in_executor(_PARSER, parse_body, body)


class BodyRoute(APIRoute):
    """A route whose handler gets a `BodyRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        handle = super().get_route_handler()

        async def handle_body(request: Request) -> Response:
            return await handle(BodyRequest(request.scope, request.receive))

        return handle_body
