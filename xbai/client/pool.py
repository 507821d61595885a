"""HTTP clients of the services: several copies of one service behind a list of URLs, used as if they were one."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import resource
import socket
import sys
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from xbai.api_key import API_KEY_VARIABLE, authorization
from xbai.client.replicas import RETRY_BASE_S, RETRY_MAX_S, Replica, Replicas, RetryPolicy, backoff_s
from xbai.client.wire import BrokenAnswerError, ReadyAnswer, ReportedFailureError, ServedModel, read_answer
from xbai.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0
MAX_DETAIL_CHARS = 1000
OPEN_FILES = 65536
KEEP_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
"""A machine that loses its power closes no connection: this tells it from one that takes long to answer."""

TOO_LONG = 413
"""The one refusal that belongs to a question: others are of the options or the service, and end the run."""

WRONG_SERVICE = (403, 404, 405)
FIELD_MISSING = "Field required"
"""In FastAPI's words: the service asks for what this kind of request does not have."""


class RequestTooLongError(Exception):
    """The request's text is too long for the model, however often asked (413). The driver keeps a refused sample."""


class RequestFailedError(Exception):
    """The service failed on this request each time. The next run asks for it again.

    Every other refusal (4xx but 408 and 429) is a `UserError`, which ends the run: what is refused for its options is
    refused for every question.
    """


class ServiceUnavailableError(UserError):
    """No copy of the service could be reached, or made to answer, for too long."""


class _TryAgainError(Exception):
    def __init__(self, problem: str, is_failure: bool) -> None:
        super().__init__(problem)
        self.is_failure = is_failure


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


def open_client(api_key: str | None = None) -> httpx.AsyncClient:
    """Connections for any number of requests in flight (the pools bound those), as far as the system allows.

    A transport of its own goes past proxies that the environment names: the services are near, often on the same host.
    """
    _raise_file_limit()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    transport = httpx.AsyncHTTPTransport(limits=limits, socket_options=KEEP_ALIVE)
    return httpx.AsyncClient(transport=transport, headers=authorization(api_key))


def _raise_file_limit() -> None:
    """Each connection is an open file, of which a process usually may have 1024 until it asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class ServicePool:
    """Posts to the copy with the least outstanding work; retries; sets a dead copy aside and tries it again later."""

    def __init__(
        self, urls: str, route: str, client: httpx.AsyncClient, policy: RetryPolicy, max_in_flight: int
    ) -> None:
        self._replicas = Replicas(base_urls(urls), max_in_flight)
        self._route = route
        self._client = client
        self._policy = policy
        self._tickets = itertools.count()
        self._option = ""
        self._described: dict[str, ReadyAnswer] = {}

    @property
    def capacity(self) -> int:
        """Requests that can be in flight at once."""
        return sum(replica.max_in_flight for replica in self._replicas.all)

    async def room(self) -> None:
        """Wait until a copy has room for one more than the requests that wait."""
        async with self._replicas.lease(ticket=sys.maxsize, weight=0):
            return

    async def post(
        self, payload: dict[str, Any], read: Callable[[bytes], T], weight: int = 1, ticket: int | None = None
    ) -> T:
        """What is read from the answer to `payload`.

        Args:
            read: makes of an answer's body what is returned, or raises as `read_answer` does.
            weight: how much work it is, for the balance among the copies.
            ticket: of the requests that wait, the lowest goes first; by default in the order of the calls.

        Raises:
            RequestTooLongError: for the model.
            RequestFailedError: `max_attempts` failures.
            UserError: the service refuses the request for what has nothing to do with its text: bad options, another
                API key, not this kind of service; or a copy that was away serves another model (see `served_model`).
            ServiceUnavailableError: every copy has been out of reach for `patience_s`, or answers as another kind of
                service does, `max_attempts` times in a row.
        """
        ticket = next(self._tickets) if ticket is None else ticket
        failures, failed_on = 0, set[str]()
        while True:
            try:
                async with self._replicas.lease(ticket, weight, failed_on) as replica:
                    return await self._attempt(replica, payload, read)
            except _TryAgainError as problem:
                failures += problem.is_failure
                failed_on |= {replica.base_url} if problem.is_failure else set()
                if failures >= self._policy.max_attempts:
                    raise RequestFailedError(f"{failures} attempts failed, the last with: {problem}") from None
                self._check_patience(str(problem))
                if problem.is_failure:
                    logger.warning("%s (attempt %d): %s", self._route, failures, problem)
                    await asyncio.sleep(backoff_s(failures))

    async def served_model(self, option: str) -> ServedModel:
        """What the copies serve that are ready. From now on the others, and any that has been away, are asked as well
        before they get a request.

        Args:
            option: names the service in errors.

        Raises:
            ServiceUnavailableError: none is ready within `patience_s`.
            UserError: they serve different models, or a service asks for another API key.
        """
        self._option = option
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._policy.patience_s
        failures = strange_rounds = 0
        while True:
            problems = await asyncio.gather(*map(self._greet, self._replicas.all))
            if self._described:
                return ServedModel.from_copies(option, list(self._described.values()))
            strange_rounds = strange_rounds + 1 if self._are_foreign() else 0
            if strange_rounds >= self._policy.max_attempts:
                raise self._foreign(problems[-1])
            if clock() > deadline:
                raise ServiceUnavailableError(
                    f"no service is ready at {self._tried()} ({problems[-1]}); start it first"
                )
            logger.warning("waiting for a service at %s", self._tried())
            failures += 1
            await asyncio.sleep(backoff_s(failures))

    async def _greet(self, replica: Replica) -> str:
        """Why it is not ready; nothing where it is."""
        try:
            await self._check_model(replica)
        except _TryAgainError as problem:
            return str(problem)
        replica.succeeded()
        return ""

    async def _attempt(self, replica: Replica, payload: dict[str, Any], read: Callable[[bytes], T]) -> T:
        if self._described and not replica.is_known:
            await self._check_model(replica)
        try:
            response = await self._client.post(
                replica.base_url + self._route,
                json=payload,
                timeout=httpx.Timeout(self._policy.request_timeout_s, connect=CONNECT_TIMEOUT_S, pool=None),
            )
            if response.is_success:
                answer = read(response.content)
                replica.answered()
                return answer
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            raise self._failure(replica, "timed out", answered=True) from None
        except ReportedFailureError as error:
            raise self._failure(replica, f"the service reports: {error}", answered=True) from None
        except (httpx.DecodingError, BrokenAnswerError) as error:
            raise self._failure(replica, f"no answer of {self._route}: {error}", answered=True, broken=True) from None
        except httpx.TransportError as error:
            raise self._failure(replica, f"{type(error).__name__}: {error}", answered=False) from None
        problem = f"{response.status_code}: {_detail(response)}"
        if response.status_code == 408 or not response.is_client_error:
            raise self._failure(replica, problem, answered=response.status_code != 503)
        if response.status_code == 429:
            raise self._refusal(replica, problem, retry_after_s(response))
        replica.succeeded()
        if response.status_code == TOO_LONG:
            raise RequestTooLongError(problem)
        _check_key(response)
        is_other = response.status_code in WRONG_SERVICE or FIELD_MISSING in problem
        hint = "; is this the right service?" if is_other else ""
        raise UserError(f"{response.url}: {problem}{hint}")

    def _refusal(self, replica: Replica, problem: str, retry_after_s: float) -> _TryAgainError:
        seconds = replica.refused(asyncio.get_running_loop().time(), retry_after_s)
        if seconds is not None:
            logger.warning("%s has refused every request for %.0f s (%s)", replica.base_url, seconds, problem)
        return _TryAgainError(problem, is_failure=False)

    def _failure(self, replica: Replica, problem: str, answered: bool, broken: bool = False) -> _TryAgainError:
        pause = replica.failed(asyncio.get_running_loop().time(), answered, broken)
        if pause is not None:
            logger.warning("%s is set aside for %.1f s (%s)", replica.base_url, pause, problem)
        return _TryAgainError(problem, is_failure=answered and not replica.strange_answers)

    def _check_patience(self, problem: str) -> None:
        now, patience_s = asyncio.get_running_loop().time(), self._policy.patience_s
        if not all(replica.is_lost(now, patience_s, self._policy.max_attempts) for replica in self._replicas.all):
            return
        if self._are_foreign():
            raise self._foreign(problem)
        raise ServiceUnavailableError(
            f"no answer from {self._tried()} for {patience_s:g} s ({problem}); "
            "see to the service, then run the same command again to go on"
        )

    def _are_foreign(self) -> bool:
        return all(replica.strange_answers for replica in self._replicas.all)

    def _foreign(self, problem: str) -> ServiceUnavailableError:
        return ServiceUnavailableError(f"{self._tried()}: {problem}; is this the right service?")

    def _tried(self) -> str:
        return ", ".join(replica.base_url for replica in self._replicas.all)

    async def _check_model(self, replica: Replica) -> None:
        """Ask a copy what it serves; one that has no such route goes with any."""
        try:
            response = await self._client.get(f"{replica.base_url}/ready", timeout=CONNECT_TIMEOUT_S)
            _check_key(response)
            found = read_answer(ReadyAnswer, response.content) if response.is_success else ReadyAnswer()
        except ReportedFailureError as error:
            raise self._failure(replica, f"the service reports: {error}", answered=False) from None
        except (httpx.DecodingError, BrokenAnswerError) as error:
            raise self._failure(replica, f"no answer of /ready: {error}", answered=False, broken=True) from None
        except httpx.TransportError as error:
            raise self._failure(replica, f"{type(error).__name__}: {error}", answered=False) from None
        if response.is_server_error:
            raise self._failure(replica, f"{response.status_code}: {_detail(response)}", answered=False)
        ServedModel.from_copies(self._option, [*self._described.values(), found])
        self._described[replica.base_url] = found
        replica.is_known = True


def _check_key(response: httpx.Response) -> None:
    if response.status_code == 401:
        raise UserError(f"{response.url}: {_detail(response)}; give --api_key_file, or set {API_KEY_VARIABLE}")


def retry_after_s(response: httpx.Response) -> float:
    """For how long a refusal asks not to be asked again, within bounds."""
    try:
        return min(RETRY_MAX_S, max(0.0, float(response.headers.get("Retry-After", RETRY_BASE_S))))
    except ValueError:
        return RETRY_BASE_S


def _detail(response: httpx.Response) -> str:
    """What a refusal says, as one line that can be logged and kept."""
    try:
        detail = str(json.loads(response.content)["detail"])
    except (ValueError, KeyError, TypeError, RecursionError):
        detail = response.content[:MAX_DETAIL_CHARS].decode(errors="replace")
    return " ".join(detail[:MAX_DETAIL_CHARS].encode(errors="backslashreplace").decode().split())
