"""Clients that go away before their answer."""

from __future__ import annotations

from starlette.types import Receive

from xbai.serve.errors import ServiceError

CLIENT_CLOSED_REQUEST = 499


async def until_disconnected(receive: Receive) -> None:
    """Return when the client of a request, whose body has been read, is gone."""
    while (await receive())["type"] != "http.disconnect":
        continue


def client_gone() -> ServiceError:
    """What nobody reads."""
    return ServiceError(CLIENT_CLOSED_REQUEST, "the client closed the connection")
