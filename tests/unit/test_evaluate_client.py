"""The client against services that are slow, busy, failing or dead, over real sockets."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from fastapi import FastAPI, Response

from xbai.client import replicas
from xbai.client.pool import (
    RequestFailedError,
    RequestTooLongError,
    ServicePool,
    ServiceUnavailableError,
    base_urls,
    open_client,
)
from xbai.client.replicas import RetryPolicy
from xbai.client.wire import Answer, ServedModel, read_answer
from xbai.errors import UserError


class Ok(Answer):
    ok: bool


OK = Ok(ok=True)
read_ok = partial(read_answer, Ok)


class Script:
    """A service that answers each request as told: a status, or `ok` after the script is used up.

    It answers after `seconds`, and no sooner than `may_answer`. Its model is the next of `identities` whenever it is
    asked for, at last always the same; with None it is not ready.
    """

    def __init__(
        self,
        *statuses: int,
        seconds: float = 0.0,
        may_answer: Callable[[], bool] = lambda: True,
        identities: tuple[str | None, ...] = ("m:1a",),
    ) -> None:
        self.statuses = list(statuses)
        self.described = 0
        self.answered = self.running = self.most_running = 0
        self.app = FastAPI()

        @self.app.post("/generate")
        async def generate() -> Response:
            self.answered += 1
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            await asyncio.sleep(seconds)
            while not may_answer():
                await asyncio.sleep(0.01)
            self.running -= 1
            if self.statuses:
                return Response('{"detail": "as told"}', self.statuses.pop(0), {"Retry-After": "0.05"})
            return Response('{"ok": true}', media_type="application/json")

        @self.app.get("/ready")
        async def ready(response: Response) -> dict[str, object]:
            identity = identities[min(self.described, len(identities) - 1)]
            self.described += 1
            response.status_code = 200 if identity else 503
            return {"scores": True, "identity": identity}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "RETRY_BASE_S", 0.02)


RESERVED = socket.socket()
"""Nobody listens at its port, and nobody else can."""
RESERVED.bind(("127.0.0.1", 0))


def dead_url() -> str:
    return f"http://127.0.0.1:{RESERVED.getsockname()[1]}"


def posts(urls: str, count: int, policy: RetryPolicy | None = None, max_in_flight: int = 4) -> list:
    async def run() -> list:
        async with open_client() as client:
            pool = ServicePool(urls, "/generate", client, policy or RetryPolicy(), max_in_flight)
            return await asyncio.gather(*(pool.post({"i": i}, read_ok) for i in range(count)), return_exceptions=True)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("urls", "expected"),
    [
        ("http://a:1/score,http://b:2/score", ["http://a:1", "http://b:2"]),
        (" http://a:1/any/path?x=1 , a:2", ["http://a:1", "http://a:2"]),
        ("https://[::1]:8000/", ["https://[::1]:8000"]),
        ("http://a:1,http://a:1/score", ["http://a:1"]),
    ],
)
def test_base_urls(urls: str, expected: list[str]) -> None:
    assert base_urls(urls) == expected


@pytest.mark.parametrize("urls", ["", " , ", "ftp://a", "http://"])
def test_base_urls_refuse(urls: str) -> None:
    with pytest.raises(UserError, match="write http://host:port"):
        base_urls(urls)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_passing_trouble_is_retried(serve_app: Callable[[FastAPI], str], status: int) -> None:
    script = Script(status, status)
    assert posts(serve_app(script.app), 1) == [OK]
    assert script.answered == 3


@pytest.mark.parametrize(
    ("status", "attempts", "kind"),
    [
        (413, 1, RequestTooLongError),
        (400, 1, UserError),
        (422, 1, UserError),
        (500, 3, RequestFailedError),
        (401, 1, UserError),
        (404, 1, UserError),
    ],
)
def test_what_never_succeeds_ends(
    serve_app: Callable[[FastAPI], str], status: int, attempts: int, kind: type[Exception]
) -> None:
    script = Script(*[status] * 10)
    (error,) = posts(serve_app(script.app), 1, RetryPolicy(max_attempts=3))
    assert isinstance(error, kind)
    assert "as told" in str(error)
    assert script.answered == attempts


def test_a_copy_that_fails_at_once_does_not_swallow_all_work(serve_app: Callable[[FastAPI], str]) -> None:
    broken, healthy = Script(*[500] * 1000), Script(seconds=0.05)
    urls = f"{serve_app(broken.app)},{serve_app(healthy.app)}"
    assert posts(urls, 40, RetryPolicy(max_attempts=2)) == [OK] * 40, "no request fails there twice"
    assert broken.answered < 20


def test_what_is_no_json_is_tried_again(serve_app: Callable[[FastAPI], str]) -> None:
    app = FastAPI()
    bodies = ["<html>a proxy's page</html>", '{"ok": true}']
    app.post("/generate")(lambda: Response(bodies.pop(0), media_type="application/json"))
    assert posts(serve_app(app), 1) == [OK]


def test_a_dead_copy_is_set_aside(serve_app: Callable[[FastAPI], str]) -> None:
    script = Script()
    assert posts(f"{dead_url()},{serve_app(script.app)}", 12) == [OK] * 12
    assert script.answered == 12


def test_nothing_alive_gives_up_in_one_line() -> None:
    (error,) = posts(dead_url(), 1, RetryPolicy(patience_s=0.1))
    assert isinstance(error, ServiceUnavailableError)
    assert "run the same command again" in str(error)


def test_a_copy_that_only_refuses_is_said_and_given_up_unless_it_has_work_of_ours(
    serve_app: Callable[[FastAPI], str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(replicas, "REFUSALS_LOG_S", 0.1)
    policy = RetryPolicy(patience_s=0.3)
    (error,) = posts(serve_app(Script(*[429] * 1000).app), 1, policy)
    assert isinstance(error, ServiceUnavailableError)
    assert "429: as told" in str(error)
    assert 1 <= caplog.text.count("has refused every request for") <= 4

    class OneAtATime(Script):
        """It is busy with the first request for longer than the patience, and refuses the others meanwhile."""

        def __init__(self) -> None:
            super().__init__()
            self.app = FastAPI()

            @self.app.post("/generate")
            async def generate() -> Response:
                if self.running:
                    return Response('{"detail": "full"}', 429, {"Retry-After": "0.05"})
                self.running += 1
                await asyncio.sleep(0.6)
                self.running -= 1
                return Response('{"ok": true}', media_type="application/json")

    assert posts(serve_app(OneAtATime().app), 2, policy) == [OK] * 2


@pytest.mark.parametrize("status", [500, 503, 504])
def test_a_failure_after_long_work_is_no_absence(serve_app: Callable[[FastAPI], str], status: int) -> None:
    script, healthy = Script(status, seconds=0.3), Script(seconds=0.3)
    urls = f"{serve_app(script.app)},{serve_app(healthy.app)}"
    assert posts(urls, 4, RetryPolicy(patience_s=0.1)) == [OK] * 4


def test_a_copy_that_dies_during_long_work_ends_nothing(serve_app: Callable[[FastAPI], str]) -> None:
    async def run() -> Ok:
        async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(10)
            await asyncio.sleep(0.3)
            writer.close()
            dying.close()

        dying = await asyncio.start_server(die, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{dying.sockets[0].getsockname()[1]}"
        async with open_client() as client:
            policy = RetryPolicy(patience_s=0.1)
            return await ServicePool(f"{url},{healthy}", "/generate", client, policy, 1).post({}, read_ok)

    healthy = serve_app(Script().app)
    assert asyncio.run(run()) == OK


def test_a_slow_answer_times_out_and_is_tried_again(serve_app: Callable[[FastAPI], str]) -> None:
    script = Script(seconds=2.0)
    (error,) = posts(serve_app(script.app), 1, RetryPolicy(max_attempts=2, request_timeout_s=0.5))
    assert isinstance(error, RequestFailedError)
    assert script.answered == 2


def test_work_goes_where_least_is_outstanding(serve_app: Callable[[FastAPI], str]) -> None:
    fast = Script()
    slow = Script(may_answer=lambda: fast.answered == 36)
    urls = f"{serve_app(fast.app)},{serve_app(slow.app)}"
    assert posts(urls, 40, RetryPolicy(max_attempts=1, request_timeout_s=60), max_in_flight=4) == [OK] * 40
    assert slow.answered == slow.most_running == 4 >= fast.most_running


def test_more_requests_in_flight_than_a_process_may_open_files_at_first(serve_app: Callable[[FastAPI], str]) -> None:
    script = Script(may_answer=lambda: script.most_running == 60)
    url = serve_app(script.app)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard))
    try:
        policy = RetryPolicy(max_attempts=1, request_timeout_s=60)
        assert posts(url, 60, policy, max_in_flight=60) == [OK] * 60
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def served_then_posts(urls: str, count: int) -> tuple[ServedModel, list]:
    async def run() -> tuple[ServedModel, list]:
        async with open_client() as client:
            pool = ServicePool(urls, "/generate", client, RetryPolicy(patience_s=0.1), max_in_flight=2)
            model = await pool.served_model("--response_api_url")
            return model, await asyncio.gather(
                *(pool.post({"i": i}, read_ok) for i in range(count)), return_exceptions=True
            )

    return asyncio.run(run())


def test_one_copy_that_is_ready_is_enough(serve_app: Callable[[FastAPI], str]) -> None:
    model, _ = served_then_posts(f"{serve_app(Script().app)},{dead_url()}", 0)
    assert model == ServedModel("m:1a", None, scores=True, log_probs=False, is_ours=True)
    assert served_then_posts(serve_app(FastAPI()), 0)[0] == ServedModel(
        None, None, scores=False, log_probs=False, is_ours=False
    )
    with pytest.raises(ServiceUnavailableError, match="start it first"):
        served_then_posts(dead_url(), 0)


def test_a_copy_that_comes_later_or_comes_back_is_asked_what_it_serves(serve_app: Callable[[FastAPI], str]) -> None:
    steady, late = Script(seconds=0.1), Script(identities=(None, "other:2b"))
    _, answers = served_then_posts(f"{serve_app(steady.app)},{serve_app(late.app)}", 20)
    refused = {str(answer) for answer in answers if isinstance(answer, UserError)}
    assert refused == {"--response_api_url: the copies serve different models (m:1a, other:2b)"}
    assert late.answered == 0

    restarted = Script(503, identities=("m:1a", "other:2b"))
    _, (error,) = served_then_posts(serve_app(restarted.app), 1)
    assert "different models" in str(error)
    assert restarted.answered == 1

    same = Script(503, identities=("m:1a", "copy:1a"))
    _, answers = served_then_posts(serve_app(same.app), 20)
    assert answers == [OK] * 20
    assert same.described <= 3, "at first, and once for each of those that failed together"
