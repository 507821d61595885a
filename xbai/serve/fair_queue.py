"""Whose turn it is: a large request, or a client with many, must not keep the others waiting."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items of requests of clients: the clients take turns, and so do the requests of each."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, OrderedDict[str, deque[T]]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def put(self, client: str, request_id: str, items: Iterable[T]) -> None:
        """Add a request that the queue does not hold; its items, one at least, come out in order."""
        waiting = deque(items)
        self._clients.setdefault(client, OrderedDict())[request_id] = waiting
        self._length += len(waiting)

    def get(self) -> T:
        """Take the next item; the queue must not be empty."""
        client, requests = self._clients.popitem(last=False)
        request_id, items = requests.popitem(last=False)
        item = items.popleft()
        self._length -= 1
        if items:
            requests[request_id] = items
        if requests:
            self._clients[client] = requests
        return item

    def remove(self, client: str, request_id: str) -> None:
        """Drop what is left of a request, if anything."""
        requests = self._clients.get(client, OrderedDict())
        self._length -= len(requests.pop(request_id, ()))
        if not requests:
            self._clients.pop(client, None)
