"""HTTP clients of the services: several copies of one service behind a list of URLs, used as if they were one."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from xbai.api_key import API_KEY_VARIABLE
from xbai.errors import UserError

logger = logging.getLogger(__name__)

RETRY_BASE_S = 0.5
RETRY_MAX_S = 30.0
CONNECT_TIMEOUT_S = 10.0


class RequestRefusedError(Exception):
    """The service does not answer this request however often asked: bad input, too long, or it fails each time."""


class ServiceUnavailableError(UserError):
    """No copy of the service could be reached for too long."""


@dataclass(frozen=True)
class RetryPolicy:
    """How long to keep trying.

    Attributes:
        max_attempts: tries of one request that reach a service and fail there (500, 504, time-out).
        patience_s: how long no copy may be reachable before giving up.
        request_timeout_s: longest wait for one answer.
    """

    max_attempts: int = 5
    patience_s: float = 300.0
    request_timeout_s: float = 3600.0


@dataclass
class Replica:
    """One copy of a service and what it is busy with.

    Attributes:
        unreachable_since: when it first failed to answer at all; None once it has answered anything.
    """

    base_url: str
    outstanding: int = 0
    in_flight: int = 0
    failures: int = 0
    resting_until: float = 0.0
    unreachable_since: float | None = None


def base_urls(urls: str) -> list[str]:
    """`scheme://host:port` of each URL in a comma-separated list; any path is dropped.

    Raises:
        UserError: the list is empty or an item is not an HTTP URL.
    """
    found = []
    for url in filter(None, (item.strip() for item in urls.split(","))):
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url!r} is not a service URL; write http://host:port")
        found.append(f"{parts.scheme}://{parts.netloc}")
    if not found:
        raise UserError(f"no service URL in {urls!r}; write http://host:port[,http://host:port...]")
    return list(dict.fromkeys(found))


def backoff_s(failures: int) -> float:
    """Seconds to wait after that many failures in a row: doubling, capped, with jitter."""
    return min(RETRY_MAX_S, RETRY_BASE_S * 2 ** (failures - 1)) * random.uniform(0.75, 1.25)


class ServicePool:
    """Posts to the copy with the least outstanding work; retries; sets a dead copy aside and tries it again later."""

    def __init__(
        self, urls: str, route: str, client: httpx.AsyncClient, policy: RetryPolicy, max_in_flight: int
    ) -> None:
        self.replicas = [Replica(url) for url in base_urls(urls)]
        self.max_in_flight = max_in_flight
        self._route = route
        self._client = client
        self._policy = policy
        self._changed = asyncio.Condition()

    @property
    def capacity(self) -> int:
        """Requests that can be in flight at once."""
        return self.max_in_flight * len(self.replicas)

    async def post(self, payload: dict[str, Any], weight: int = 1) -> dict[str, Any]:
        """The answer to `payload`. `weight` is how much work it is, for the balance among the copies.

        Raises:
            RequestRefusedError: a 4xx answer, or `max_attempts` failures.
            UserError: the service asks for another API key.
            ServiceUnavailableError: every copy has been out of reach for `patience_s`.
        """
        clock = asyncio.get_running_loop().time
        failed_attempts = 0
        while True:
            async with self._lease(weight) as replica:
                try:
                    response = await self._client.post(
                        replica.base_url + self._route,
                        json=payload,
                        timeout=httpx.Timeout(self._policy.request_timeout_s, connect=CONNECT_TIMEOUT_S),
                    )
                except (httpx.ReadTimeout, httpx.WriteTimeout):
                    failed_attempts, problem = failed_attempts + 1, "timed out"
                    replica.unreachable_since = None
                except httpx.TransportError as error:
                    problem = f"{type(error).__name__}: {error}"
                    self._set_aside(replica, problem)
                else:
                    if response.status_code != 503:
                        replica.unreachable_since = None
                    if response.is_success:
                        replica.failures = 0
                        return response.json()
                    _check_key(response)
                    problem = f"{response.status_code}: {_detail(response)}"
                    if response.status_code == 429:
                        replica.resting_until = clock() + _retry_after_s(response)
                    elif response.status_code == 503:
                        self._set_aside(replica, problem)
                    elif response.is_server_error:
                        failed_attempts += 1
                    else:
                        raise RequestRefusedError(problem)
            if failed_attempts >= self._policy.max_attempts:
                raise RequestRefusedError(f"{failed_attempts} attempts failed, the last with: {problem}")
            if self._out_of_reach_s(clock()) > self._policy.patience_s:
                tried = ", ".join(replica.base_url for replica in self.replicas)
                raise ServiceUnavailableError(
                    f"no answer from {tried} for {self._policy.patience_s:g} s ({problem}); "
                    "start the service, then run the same command again to go on"
                )
            if failed_attempts:
                logger.warning("%s (attempt %d): %s", self._route, failed_attempts, problem)
                await asyncio.sleep(backoff_s(failed_attempts))

    async def describe(self) -> list[dict[str, Any]]:
        """`GET /ready` of every copy that answers: `{}` for one that has no such route.

        Raises:
            ServiceUnavailableError: none answers within `patience_s`.
            UserError: a service asks for another API key.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._policy.patience_s
        failures = 0
        while True:
            answers = await asyncio.gather(*(self._ready(replica) for replica in self.replicas))
            found = [answer for answer in answers if answer is not None]
            if found:
                return found
            tried = ", ".join(replica.base_url for replica in self.replicas)
            if clock() > deadline:
                raise ServiceUnavailableError(f"no service is ready at {tried}; start it first")
            logger.warning("waiting for a service at %s", tried)
            failures += 1
            await asyncio.sleep(backoff_s(failures))

    async def _ready(self, replica: Replica) -> dict[str, Any] | None:
        try:
            response = await self._client.get(f"{replica.base_url}/ready", timeout=CONNECT_TIMEOUT_S)
        except httpx.TransportError as error:
            logger.warning("%s: %s", replica.base_url, error or type(error).__name__)
            return None
        if response.status_code == 503:
            return None
        _check_key(response)
        return response.json() if response.is_success else {}

    @asynccontextmanager
    async def _lease(self, weight: int) -> AsyncIterator[Replica]:
        replica = await self._acquire()
        replica.outstanding += weight
        replica.in_flight += 1
        try:
            yield replica
        finally:
            replica.outstanding -= weight
            replica.in_flight -= 1
            async with self._changed:
                self._changed.notify_all()

    async def _acquire(self) -> Replica:
        clock = asyncio.get_running_loop().time
        async with self._changed:
            while True:
                now = clock()
                free = [replica for replica in self.replicas if self._has_room(replica, now)]
                if free:
                    return min(free, key=lambda replica: replica.outstanding)
                resting = [replica.resting_until - now for replica in self.replicas if replica.resting_until > now]
                await self._wait_for_change(min(resting, default=None))

    async def _wait_for_change(self, timeout_s: float | None) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return

    def _has_room(self, replica: Replica, now: float) -> bool:
        # A copy that failed last time is tried with one request before it gets its share again.
        room = 1 if replica.failures else self.max_in_flight
        return replica.resting_until <= now and replica.in_flight < room

    def _out_of_reach_s(self, now: float) -> float:
        """For how long no copy has answered; 0 while any is not known to be away."""
        return min(0.0 if r.unreachable_since is None else now - r.unreachable_since for r in self.replicas)

    def _set_aside(self, replica: Replica, problem: str) -> None:
        now = asyncio.get_running_loop().time()
        if replica.unreachable_since is None:
            replica.unreachable_since = now
        if replica.resting_until > now:
            return
        replica.failures += 1
        pause = backoff_s(replica.failures)
        replica.resting_until = now + pause
        logger.warning("%s is set aside for %.1f s (%s)", replica.base_url, pause, problem)


def _check_key(response: httpx.Response) -> None:
    if response.status_code == 401:
        raise UserError(f"{response.url}: {_detail(response)}; give --api_key_file, or set {API_KEY_VARIABLE}")


def _retry_after_s(response: httpx.Response) -> float:
    try:
        return min(RETRY_MAX_S, max(0.0, float(response.headers.get("Retry-After", RETRY_BASE_S))))
    except ValueError:
        return RETRY_BASE_S


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
