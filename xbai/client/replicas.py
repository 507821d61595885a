"""The copies of one service, which of them takes the next request, and for how long it is tried."""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import random
from collections.abc import AsyncIterator, Iterator, Sequence, Set
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Annotated

import typer

RETRY_BASE_S = 0.5
RETRY_MAX_S = 30.0
REFUSALS_LOG_S = 60.0
AFFINITY_SLACK = 32
"""Work by which the copy that has seen a beginning may be busier than the others: a request of the highest effort."""


@dataclass(frozen=True)
class RetryPolicy:
    """How long to keep trying.

    Attributes:
        max_attempts: tries of one request that reach a service and fail there (500, 504, time-out).
        patience_s: how long every copy may be out of reach, or full of the work of others, before giving up.
    """

    max_attempts: int = 5
    request_timeout_s: Annotated[float, typer.Option("--request_timeout", min=0.001)] = 3600.0
    """Seconds to an answer; then 504."""
    patience_s: Annotated[float, typer.Option("--patience", min=0)] = 300.0
    """Seconds to wait for an absent service."""


def backoff_s(failures: int) -> float:
    """Seconds to wait after that many failures in a row: doubling, capped, with jitter."""
    return min(RETRY_MAX_S, RETRY_BASE_S * 2 ** (failures - 1)) * random.uniform(0.75, 1.25)


@dataclass
class Replica:
    """One copy of a service, and what it is busy with.

    Attributes:
        max_in_flight: most requests that it is ever given at once.
        name: what people know it by.
        limit: most that it is given now; lower where it has said that it is full.
        in_flight, outstanding: its requests, and how much work they are.
        failures: in a row.
        resting_until: when it may be tried again after a failure.
        failing_since: when that row of failures began; None where the last answer was good.
        answers: whether any of these failures was an answer of the service.
        refusing_since: since when every answer has been that it is full; None where the last one was another.
        is_known: what it serves has been asked for, and it has not been away since.
        has_answered: it has given an answer that was as it should be.
        strange_answers: in a row, each as of another kind of service, of one that has given no others.
    """

    base_url: str
    max_in_flight: int
    name: str = ""
    limit: int = field(init=False)
    in_flight: int = 0
    outstanding: int = 0
    failures: int = 0
    resting_until: float = 0.0
    failing_since: float | None = None
    answers: bool = False
    refusing_since: float | None = None
    is_known: bool = False
    has_answered: bool = False
    strange_answers: int = 0
    _logged_at: float = 0.0
    _grows_at: float = 0.0
    _refusals: int = 0
    _was_refused: bool = False

    def __post_init__(self) -> None:
        """A copy is trusted until it says that it is full."""
        self.limit = self.max_in_flight

    def succeeded(self) -> None:
        """It answered as it should."""
        self.refusing_since = None
        self._is_well()

    def answered(self) -> None:
        """It did what it was asked for."""
        self.has_answered = True
        self.succeeded()

    def failed(self, now: float, answered: bool, broken: bool = False) -> float | None:
        """Set it aside; returns for how long, None where it rests already (its other requests fail together).

        Args:
            now: the event loop's time.
            answered: the service is there.
            broken: what came is not what such a service answers.
        """
        self.refusing_since = None
        self.failing_since = now if self.failing_since is None else self.failing_since
        self.answers = self.answers or answered
        self.is_known = self.is_known and answered and not broken
        if not broken or self.has_answered:
            self.strange_answers = 0
        if self.resting_until > now:
            return None
        self.failures += 1
        self.strange_answers += broken and not self.has_answered
        pause = backoff_s(self.failures)
        self.resting_until = now + pause
        return pause

    def refused(self, now: float, retry_after_s: float) -> float | None:
        """It refused a request that is still counted: it gets no more than it has, until later one more is tried.

        Returns:
            For how long it has only refused, with nothing else of ours in flight there, where it is time to say so.
        """
        self._is_well()
        self.limit = min(self.limit, self.in_flight - 1)
        self._refusals += not self._was_refused  # Refusals of a burst count once.
        self._was_refused = True
        self._grows_at = now + max(retry_after_s * random.uniform(1.0, 1.25), backoff_s(self._refusals))
        if self.refusing_since is None:
            self.refusing_since = self._logged_at = now
        if self.in_flight > 1 or now - self._logged_at < REFUSALS_LOG_S:
            return None
        self._logged_at = now
        return now - self.refusing_since

    def has_room(self, now: float) -> bool:
        """Whether it may be given a request: after a failure only one, to try it."""
        if now < self.resting_until:
            return False
        if self.failures:
            return self.in_flight == 0
        return self.in_flight < self.limit or (self.limit < self.max_in_flight and now >= self._grows_at)

    def room_again_at(self, now: float) -> float | None:
        """When it will have room with no event in between; None where only an event makes room."""
        times = [self.resting_until]
        if self.limit < self.max_in_flight:
            times.append(self._grows_at)
        return min((time for time in times if time > now), default=None)

    def preference(self) -> tuple[bool, bool, int]:
        """Low for the copy to choose: one that works, that is not believed to be full, with the least work."""
        return self.failures > 0, self.in_flight >= self.limit, self.outstanding

    def take(self, weight: int, now: float) -> None:
        """Count a request that it is given."""
        if self.in_flight >= self.limit:
            self._refusals = self._refusals if self._was_refused else 0
            self._was_refused = False
            self._grows_at = now + backoff_s(1)
            self.limit += 1
        self.in_flight += 1
        self.outstanding += weight

    def give_back(self, weight: int) -> None:
        """The request has ended."""
        self.in_flight -= 1
        self.outstanding -= weight

    def is_lost(self, now: float, patience_s: float, max_failures: int) -> bool:
        """It has not answered for the whole patience, or only refused, or only failed, several times.

        Of another kind, it needs no patience, only several tries. Refusing, it may still answer what it has of ours.
        """
        if self.refusing_since is not None:
            return self.in_flight == 0 and now - self.refusing_since > patience_s
        if self.strange_answers:
            return self.strange_answers >= max_failures
        if self.failing_since is None or now - self.failing_since <= patience_s:
            return False
        return not self.answers or self.failures >= max_failures

    def _is_well(self) -> None:
        self.failures = 0
        self.resting_until = 0.0
        self.failing_since = None
        self.answers = False
        self.strange_answers = 0


@dataclass(order=True)
class _Waiting:
    ticket: int
    weight: int = field(compare=False)
    failed_on: Set[str] = field(compare=False)
    replica: asyncio.Future[Replica] = field(compare=False)


class Replicas:
    """Gives each request to the copy with the least outstanding work, the oldest request first.

    Attributes:
        all: the copies. Who lends them by `borrow` alone may add and remove some.
    """

    def __init__(self, base_urls: Sequence[str], max_in_flight: int) -> None:
        self.all = [Replica(url, max_in_flight) for url in base_urls]
        self._waiting: list[_Waiting] = []
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def lease(self, ticket: int, weight: int, failed_on: Set[str] = frozenset()) -> AsyncIterator[Replica]:
        """A copy that has room, once there is one; the lowest ticket first.

        Args:
            weight: how much work the request is.
            failed_on: URLs of the copies that failed on it: left to other requests while any other copy works.
        """
        waiting = _Waiting(ticket, weight, failed_on, asyncio.get_running_loop().create_future())
        heapq.heappush(self._waiting, waiting)
        self._hand_out()
        try:
            yield await waiting.replica
        finally:
            if waiting.replica.done() and not waiting.replica.cancelled():
                waiting.replica.result().give_back(weight)
            self._hand_out()

    @contextmanager
    def borrow(self, weight: int, beginning: bytes = b"", tried: Set[str] = frozenset()) -> Iterator[Replica | None]:
        """A copy that has room at once; None where none has.

        Args:
            weight: how much work the request is. Without any it needs no room.
            beginning: requests with the same one go to the same copy (rendezvous hashing), which has it in its prefix
                cache, as long as it works and has at most `AFFINITY_SLACK` more to do than the least busy one.
            tried: URLs of the copies that are out of the question.
        """
        now = asyncio.get_running_loop().time()
        open_to_it = [replica for replica in self.all if replica.base_url not in tried]
        free = [replica for replica in open_to_it if not weight or replica.has_room(now)]
        replica = min(free, key=Replica.preference, default=None)
        if replica is None or not weight:
            yield replica
            return
        if beginning:
            known = max(free, key=lambda one: hashlib.sha256(one.base_url.encode() + beginning).digest())
            is_as_well = known.preference()[:2] <= replica.preference()[:2]
            if is_as_well and known.outstanding <= replica.outstanding + AFFINITY_SLACK:
                replica = known
        replica.take(weight, now)
        try:
            yield replica
        finally:
            replica.give_back(weight)

    def _hand_out(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        passed_over: list[_Waiting] = []
        while self._waiting and (free := [replica for replica in self.all if replica.has_room(now)]):
            waiting = heapq.heappop(self._waiting)
            if waiting.replica.done():  # cancelled while it waited
                continue
            if not (choice := self._acceptable(free, waiting.failed_on)):
                passed_over.append(waiting)
                continue
            replica = min(choice, key=Replica.preference)
            replica.take(waiting.weight, now)
            waiting.replica.set_result(replica)
        for waiting in passed_over:
            heapq.heappush(self._waiting, waiting)
        if self._timer is not None:
            self._timer.cancel()
        times = [time for replica in self.all if (time := replica.room_again_at(now)) is not None]
        if self._waiting and times:
            self._timer = loop.call_at(min(times), self._hand_out)

    def _acceptable(self, free: list[Replica], failed_on: Set[str]) -> list[Replica]:
        another_works = any(not replica.failures for replica in self.all if replica.base_url not in failed_on)
        return [replica for replica in free if replica.base_url not in failed_on] if another_works else free
