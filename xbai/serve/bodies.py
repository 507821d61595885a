"""Request bodies as JSON: what a hostile one costs is bounded, and nobody waits while a large one is read."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from json.decoder import JSONArray, JSONObject  # type: ignore[attr-defined]
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from xbai.serve.errors import ServiceError
from xbai.serve.schemas import MAX_STOP_TOKENS

MAX_BODY_VALUES = 2 * MAX_STOP_TOKENS
"""Twice as many as the largest request that the schemas take has."""
MAX_BODY_KEYS = 128
"""Of the object that a body is; each unknown one would cost an error, which is costlier to make than a value."""
LARGE_BODY_BYTES = 64 << 10
"""From here on a body is parsed off the event loop."""

_DELIMITERS = b'"[{,'
_LONG_NUMBER = re.compile(r"[-+.\deE]{400}", re.ASCII)
# One at a time: what several large bodies need while they are parsed does not add up.
_PARSER = ThreadPoolExecutor(1, thread_name_prefix="parser")


def parse_body(body: bytes) -> Any:
    """What the JSON of a body says.

    Raises:
        ServiceError: 422 for more values than any request has, before those beyond are made, for deep nesting, and in a
            large body for a number of hundreds of digits.
        json.JSONDecodeError: it is not JSON.
        UnicodeDecodeError: it is not text.
    """
    text = body.decode(json.detect_encoding(body), "surrogatepass")
    try:
        value = json.loads(text) if _has_few_values(body) else _load_few_values(text)
    except RecursionError:
        raise ServiceError(422, "body: lists and objects are nested too deeply") from None
    if isinstance(value, dict) and len(value) > MAX_BODY_KEYS:
        raise ServiceError(422, f"body: more than {MAX_BODY_KEYS} keys, which no request has")
    return value


def _has_few_values(body: bytes) -> bool:
    # In a large body texts have too many commas and quotes for this to tell.
    return len(body) < LARGE_BODY_BYTES and len(body) - len(body.translate(None, _DELIMITERS)) < MAX_BODY_VALUES


def _load_few_values(text: str) -> Any:
    """As `json.loads`, but counts, with Python's own forms of the parser's parts; strings are still read by C."""
    left = MAX_BODY_VALUES

    def scan_value(text: str, start: int) -> tuple[Any, int]:
        nonlocal left
        left -= 1
        if left < 0:
            raise ServiceError(422, f"body: more than {MAX_BODY_VALUES} values, which no request has")
        if _LONG_NUMBER.match(text, start):
            raise ServiceError(422, "body: a number of more characters than any has")
        return scan(text, start)

    decoder: Any = json.JSONDecoder()
    decoder.parse_array = lambda place, _: JSONArray(place, scan_value)
    decoder.parse_object = lambda place, strict, _, *hooks: JSONObject(place, strict, scan_value, *hooks)
    scan = py_make_scanner(decoder)
    decoder.scan_once = scan_value
    return decoder.decode(text)


class BodyRequest(Request):
    """A request whose body `parse_body` reads."""

    async def json(self) -> Any:
        """The parsed body; see `parse_body` for what it raises."""
        body = await self.body()
        if len(body) < LARGE_BODY_BYTES:
            return parse_body(body)
        # Between two bodies the event loop answers whoever waits; the parser lets go of the interpreter seldom.
        async with self.app.state.parsing:
            return await asyncio.get_running_loop().run_in_executor(_PARSER, parse_body, body)


class BodyRoute(APIRoute):
    """A route whose handler gets a `BodyRequest`. The application's `state.parsing` is the lock of its large bodies."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_body(request: Request) -> Response:
            return await handle(BodyRequest(request.scope, request.receive))

        return handle_body
