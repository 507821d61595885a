"""The proxy in front of several copies of a service: fake copies on real sockets, which do what a test wants."""

from __future__ import annotations

import asyncio
import json
import socket
import socketserver
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
from clocks import wait_until
from fastapi import FastAPI, Request
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import JSONResponse, Response, StreamingResponse
from typer.testing import CliRunner

from xbai.api_key import authorization
from xbai.cli import app as cli
from xbai.client.pool import open_client
from xbai.client.replicas import Replica, Replicas
from xbai.errors import UserError
from xbai.serve.front import app as front_app
from xbai.serve.front import copies as copies_module
from xbai.serve.front import gpus, service
from xbai.serve.front.copies import Copies
from xbai.serve.front.gpus import gpu_shares
from xbai.serve.front.metrics import gather_metrics
from xbai.serve.front.work import Work, work_of
from xbai.serve.limits import Admission, Limits
from xbai.serve.monitoring import Metrics
from xbai.serve.openai.routes import OPENAI_ROUTES
from xbai.serve.score import SCORE_ROUTES

KEY = "secret"
CHAT = "/v1/chat/completions"
NOBODY = "http://127.0.0.1:1"
"""Where nobody listens."""
Answer = Callable[[Request], Awaitable[Response]]
Start = Callable[..., tuple[str, list["FakeCopy"]]]


@dataclass
class FakeCopy:
    """What a copy was asked, and what it answers."""

    answer: Answer
    metrics: Metrics = field(default_factory=Metrics)
    asked: list[tuple[Request, bytes]] = field(default_factory=list)

    def app(self) -> FastAPI:
        app = FastAPI()
        app.get("/metrics")(lambda: Response(self.metrics.render()))
        app.get("/ready")(lambda: {"status": "ready", "identity": "m:1"})

        @app.api_route("/{path:path}", methods=["GET", "POST", "PUT"])
        async def ask(request: Request) -> Response:
            self.asked.append((request, await request.body()))
            return await self.answer(request)

        return app


async def fine(request: Request) -> Response:
    return JSONResponse({"results": []})


def status(code: int, retry_after_s: int = 30) -> Answer:
    async def answer(request: Request) -> Response:
        return JSONResponse({"detail": "no"}, code, {"Retry-After": str(retry_after_s)})

    return answer


def stream_of(*parts: str | threading.Event | Exception) -> Answer:
    """A stream of events; an event of `threading` is waited for, an exception breaks the connection."""

    async def events() -> AsyncIterator[str]:
        for part in parts:
            if isinstance(part, Exception):
                raise part
            if isinstance(part, str):
                yield part
                continue
            while not part.is_set():
                await asyncio.sleep(0.01)

    async def answer(request: Request) -> Response:
        return StreamingResponse(events(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    return answer


@pytest.fixture
def start(serve_app: Callable[..., str]) -> Start:
    """`start(answer of each copy, or its URL, ..., key=None) -> URL of the front, copies`."""

    def serve(*answers: Answer | str, key: str | None = None, **limits: Any) -> tuple[str, list[FakeCopy]]:
        copies = [FakeCopy(answer) for answer in answers if not isinstance(answer, str)]
        running = iter(copies)
        urls = [answer if isinstance(answer, str) else serve_app(next(running).app()) for answer in answers]
        replicas = Replicas([], 64)
        replicas.all += [Replica(url, 64, str(number)) for number, url in enumerate(urls)]
        known = Limits(api_key=key, **limits)
        app = front_app.create_front_app(replicas, open_client(key), known, Admission(64), Metrics())
        return serve_app(app), copies

    return serve


def chat(*texts: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": messages, **fields}


def test_a_request_reaches_a_copy_as_it_was_sent_and_the_answer_comes_back(start: Start) -> None:
    async def answer(request: Request) -> Response:
        return Response(b"\xff\0", 418, {"X-One": "1", "Connection": "X-Two", "X-Two": "2"}, "image/png")

    url, (copy,) = start(answer)
    sent = {
        "X-Mine": "a",
        "Connection": "keep-alive, X-Hop",
        "X-Hop": "b",
        "X-Request-Id": "me",
        "X-Forwarded-For": "c",
    }
    got = httpx.put(f"{url}/any/p%2Fath?q=%20&r", content=b"\0{not json", headers=sent)
    assert (got.status_code, got.content, got.headers["x-one"]) == (418, b"\xff\0", "1")
    assert got.headers.get_list("x-request-id") == ["me"] and len(got.headers.get_list("date")) == 1
    assert "x-two" not in got.headers
    ((request, body),) = copy.asked
    assert (request.method, request.url.path, request.url.query) == ("PUT", "/any/p/ath", "q=%20&r")
    assert body == b"\0{not json"
    assert (request.headers["x-mine"], request.headers.getlist("x-request-id")) == ("a", ["me"])
    assert request.headers.getlist("x-forwarded-for") == ["c"], "as a proxy of this machine says; see below"
    assert "x-hop" not in request.headers
    assert request.headers["host"] == url.removeprefix("http://"), "for its redirects"


@pytest.mark.parametrize("target", ["/a#b", "//a//b", "/../a", "/%zz", "/a?b?c#d", "*"])
def test_no_target_is_a_bug_of_the_front(start: Start, target: str) -> None:
    url, _ = start(fine)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert client.makefile("rb").readline().split()[1] in (b"200", b"404", b"400")


def test_a_copy_learns_who_asks(start: Start) -> None:
    url, (copy,) = start(fine)
    assert httpx.get(f"{url}/v1/models").is_success
    assert [request.headers["x-forwarded-for"] for request, _ in copy.asked] == ["127.0.0.1"]


def test_each_copy_gets_its_share_of_the_work(start: Start) -> None:
    gate = threading.Event()
    url, copies = start(*[stream_of(gate)] * 2)
    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(httpx.post, f"{url}/score", json={"text": "x"}) for _ in range(8)]
        wait_until(lambda: sum(len(copy.asked) for copy in copies) == 8, "all are asked")
        gate.set()
        assert all(one.result().is_success for one in done)
    assert [len(copy.asked) for copy in copies] == [4, 4]


def test_a_conversation_stays_on_its_copy(start: Start) -> None:
    url, copies = start(fine, fine)
    for number in range(12):
        turns = [f"question {number}", "answer", "and then?"]
        before = [len(copy.asked) for copy in copies]
        for length in (1, 3, 3):
            assert httpx.post(url + CHAT, json=chat(*turns[:length])).is_success
        assert {len(copy.asked) - old for copy, old in zip(copies, before, strict=True)} == {0, 3}
    assert all(copy.asked for copy in copies)


def test_a_stream_is_passed_on_as_it_comes(start: Start) -> None:
    gate = threading.Event()
    url, _ = start(stream_of("data: 1\n\n", gate, "data: ", "2\n\n: co", "mment\n\ndata: [DONE]\n\n"))
    with httpx.stream("POST", url + CHAT, json=chat("x"), timeout=60) as got:
        assert got.headers["x-accel-buffering"] == "no"
        parts = got.iter_text()
        assert next(parts) == "data: 1\n\n"
        gate.set()
        assert "".join(parts) == "data: 2\n\n: comment\n\ndata: [DONE]\n\n"


@pytest.mark.parametrize("first", ["", "data: 1\n\n"])
def test_who_leaves_is_not_worked_for(start: Start, first: str) -> None:
    left, begun = threading.Event(), threading.Event()

    async def answer(request: Request) -> Response:
        if first:
            return StreamingResponse(until_left(request), media_type="text/event-stream")
        begun.set()
        async for _ in until_left(request):
            pass
        return Response()

    async def until_left(request: Request) -> AsyncIterator[str]:
        if first:
            yield first
        try:
            while not await request.is_disconnected():
                await asyncio.sleep(0.01)
        finally:
            left.set()

    url, _ = start(answer)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        body = json.dumps(chat("x"))
        client.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        if first:
            while first.encode() not in client.recv(4096):
                continue
        else:
            assert begun.wait(60)
        assert not left.is_set()
    assert left.wait(60)


def test_a_full_copy_is_left_alone_for_as_long_as_it_asks(start: Start) -> None:
    url, (full, other) = start(status(429), fine)
    for number in range(20):
        assert httpx.post(url + CHAT, json=chat(str(number))).is_success
    assert len(full.asked) == 1 and len(other.asked) == 20


@pytest.mark.parametrize("path", ["/generate", CHAT])
def test_when_all_are_full_the_client_is_told_so(start: Start, path: str) -> None:
    url, copies = start(status(429, 7), status(429, 7))
    first = httpx.post(url + path, json=chat("x"))
    assert (first.status_code, first.headers["retry-after"], first.json()) == (429, "7", {"detail": "no"})
    second = httpx.post(url + path, json=chat("x"))
    assert second.status_code == 429 and second.headers["retry-after"]
    assert ("error" if path == CHAT else "detail") in second.json()
    assert [len(copy.asked) for copy in copies] == [1, 1]
    assert httpx.get(f"{url}/ready").json()["identity"] == "m:1", "full is ready, too"
    assert [len(copy.asked) for copy in copies] == [1, 1]


def test_a_copy_that_cannot_be_reached_or_is_stopping_costs_no_request(start: Start) -> None:
    url, (stopping, fine_one) = start(NOBODY, status(503), fine)
    for number in range(20):
        assert httpx.post(url + CHAT, json=chat(str(number))).is_success
    assert len(fine_one.asked) == 20 and 1 <= len(stopping.asked) < 20


def test_without_a_copy_the_service_is_alive_and_not_ready(start: Start) -> None:
    url, _ = start(NOBODY)
    assert httpx.get(f"{url}/health").json() == {"status": "alive", "replicas_ready": 1}
    assert httpx.get(f"{url}/ready").status_code == 503
    for path, key in (("/generate", "detail"), (CHAT, "error")):
        got = httpx.post(url + path, json=chat("x"))
        assert got.status_code == 503 and got.headers["retry-after"] and key in got.json()


def test_a_stream_whose_copy_dies_ends_with_an_error_event(start: Start) -> None:
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}
    event = f"data: {json.dumps(chunk)}\n\n"
    url, copies = start(*[stream_of(event, event + event[:20], ConnectionError("killed"))] * 2)
    got = httpx.post(url + CHAT, json=chat("x", stream=True)).text
    assert got.startswith(event + event + 'data: {"error": ')
    assert json.loads(got[2 * len(event) :].removeprefix("data: "))["error"]["type"] == "server_error"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="has failed"):
        list(client.chat.completions.create(**chat("x", stream=True, model="m")))
    assert sum(len(copy.asked) for copy in copies) == 2, "what has begun is not repeated"


def test_an_answer_that_breaks_off_is_a_503_and_not_asked_elsewhere(start: Start) -> None:
    async def answer(request: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            yield b'{"results": ['
            raise ConnectionError("killed")

        return StreamingResponse(body(), media_type="application/json")

    url, copies = start(*[answer] * 2)
    assert_has_failed(httpx.post(url + CHAT, json=chat("x")))
    assert sum(len(copy.asked) for copy in copies) == 1


def test_a_connection_that_breaks_off_is_a_503_and_not_asked_elsewhere(start: Start) -> None:
    asked: list[bytes] = []

    class Hangup(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked.append(self.request.recv(65536))

    with (
        socketserver.TCPServer(("127.0.0.1", 0), Hangup) as one,
        socketserver.TCPServer(("127.0.0.1", 0), Hangup) as two,
    ):
        for server in (one, two):
            threading.Thread(target=server.serve_forever, daemon=True).start()
        url, _ = start(*(f"http://127.0.0.1:{server.server_address[1]}" for server in (one, two)))
        assert_has_failed(httpx.post(url + CHAT, json=chat("x")))
        assert len(asked) == 1
        one.shutdown()
        two.shutdown()


def assert_has_failed(got: httpx.Response) -> None:
    assert got.status_code == 503 and got.headers["retry-after"]
    assert got.json()["error"]["type"] == "server_error"


def test_the_key_is_asked_for_at_the_front(start: Start) -> None:
    url, (copy,) = start(fine, key=KEY)
    right = authorization(KEY)
    for path in (CHAT, "/metrics", "/ready"):
        assert httpx.get(url + path).status_code == 401
        assert httpx.get(url + path, headers=authorization("wrong")).status_code == 401
        assert httpx.get(url + path, headers=right).status_code == 200
    assert httpx.get(f"{url}/health").json() == {"status": "alive", "replicas_ready": 1}
    assert [request.headers["authorization"] for request, _ in copy.asked] == [right["Authorization"]]


def test_bodies_are_bounded(start: Start) -> None:
    url, (copy,) = start(fine, max_body_bytes=1000)
    assert httpx.post(f"{url}/generate", content=b"x" * 1000).is_success
    assert httpx.post(f"{url}/generate", content=b"x" * 1001).status_code == 413
    assert httpx.post(f"{url}/generate", content=iter([b"x" * 600] * 2)).status_code == 413
    assert [len(body) for _, body in copy.asked] == [1000]


def test_metrics_are_those_of_all_copies_by_their_number(start: Start) -> None:
    url, copies = start(fine, fine, NOBODY)
    for number, copy in enumerate(copies):
        copy.metrics.requests.labels("/generate", "200").inc(10 + number)
        copy.metrics.latency.labels("/generate").observe(0.2)
    text = httpx.get(f"{url}/metrics").text
    samples = {
        (sample.name, sample.labels.get("replica"), sample.labels.get("route"), sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert text.count("# TYPE xbai_requests_total counter") == 1
    for number in range(2):
        assert samples["xbai_requests_total", str(number), "/generate", None] == 10 + number
        assert samples["xbai_request_seconds_bucket", str(number), "/generate", "0.3"] == 1
    assert {replica for _, replica, _, _ in samples} == {"0", "1", "front"}


def test_gathered_metrics_are_what_was_given() -> None:
    one = Metrics()
    one.scores.observe(0.5)
    one.watch("xbai_gauge", "A gauge.", lambda: 3)
    text = one.render().decode()
    gathered = gather_metrics({"a": text}).decode()
    assert gathered.replace('replica="a",', "").replace(',replica="a"', "").replace('{replica="a"}', "") == text


@pytest.mark.parametrize(
    ("body", "weight"),
    [
        ({"prefix_prompt": "x"}, 8),
        ({"prefix_prompt": "x", "response_num": 3}, 3),
        ({"prefix_prompt": "x", "response_num": -3}, 8),
        ({"text": "x"}, 1),
        ({"texts": ["x"] * 5}, 5),
        (chat("x"), 2),
        (chat("x", reasoning_effort="high"), 32),
        (chat("x", reasoning_effort=["high"]), 2),
        (chat("x", reasoning_effort="high", candidates=5), 5),
        (chat("x", model="m-medium"), 8),
        (chat("x", reasoning_effort="none", n=4), 4),
        ({"input": "x", "reasoning": {"effort": "medium"}}, 8),
        ({"input": "x", "reasoning": 1}, 2),
        ([], 1),
        (None, 1),
    ],
)
def test_the_weight_of_a_request_is_what_it_generates(body: Any, weight: int) -> None:
    assert work_of("POST", json.dumps(body).encode(), None).weight == weight


def test_a_default_effort_is_a_weight() -> None:
    assert work_of("POST", json.dumps(chat("x")).encode(), "high").weight == 32
    assert work_of("GET", b"", "high") == Work(0)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (chat("x"), chat("x", "y", "z", temperature=0.1), True),
        (chat("x"), chat("y"), False),
        ({"prefix_prompt": "a" * 512}, {"prefix_prompt": "a" * 513, "seed": 1}, True),
        ({"prefix_prompt": "a"}, {"prefix_prompt": "b"}, False),
        ({"input": "x"}, {"input": "x", "instructions": "y"}, False),
        ({"input": [{"role": "user", "content": "x"}]}, {"input": chat("x", "y", "z")["messages"]}, True),
        ({"prefix_prompt": "a" * 1_000_000}, {"prefix_prompt": "a" * 1_000_001}, True),
    ],
)
def test_what_later_requests_repeat_is_the_beginning(one: Any, other: Any, same: bool) -> None:
    first, second = (work_of("POST", json.dumps(body).encode(), None).beginning for body in (one, other))
    assert first and (first == second) == same


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "prefix_prompt",
    "texts",
    "text",
    "messages",
    "input",
    "reasoning",
    "reasoning_effort",
    "candidates",
    "n",
    "model",
    "instructions",
]


@settings(deadline=None)
@given(
    st.binary() | st.dictionaries(st.sampled_from(FIELDS), json_values).map(lambda value: json.dumps(value).encode())
)
def test_no_body_is_too_strange_to_be_passed_on(body: bytes) -> None:
    assert work_of("POST", body, None).weight >= 1


def test_deep_nesting_is_left_to_the_copy() -> None:
    assert work_of("POST", b"[" * 200_000, None) == Work(1)


@pytest.mark.parametrize(
    ("visible", "replicas", "size", "shares"),
    [
        ("0,1,2,3", 2, 2, ["0,1", "2,3"]),
        ("0,1,2,3", 3, 1, ["0", "1", "2"]),
        ("GPU-a, GPU-b", 2, 1, ["GPU-a", "GPU-b"]),
        ("5", 1, 1, ["5"]),
        ("", 2, 4, [None, None]),
        ("-1", 2, 1, [None, None]),
        ("0,-1,1", 2, 1, None),
        ("0,1,2", 2, 2, None),
    ],
)
def test_each_copy_has_gpus_of_its_own(
    monkeypatch: pytest.MonkeyPatch, visible: str, replicas: int, size: int, shares: list[str | None] | None
) -> None:
    monkeypatch.setenv(gpus.VISIBLE_GPUS, visible)
    if shares is not None:
        assert gpu_shares(replicas, size) == shares
        return
    with pytest.raises(UserError, match=rf"--replicas {replicas}: with {size} each they need {replicas * size} GPUs"):
        gpu_shares(replicas, size)


@pytest.mark.parametrize(
    ("listing", "shares"),
    [
        (
            "echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'; echo '  MIG 1g (UUID: MIG-1)'; echo 'GPU 1: NVIDIA H200'",
            ["0", "1"],
        ),
        ("echo No devices were found; exit 6", [None, None]),
        ("nothing", [None, None]),
    ],
)
def test_without_a_list_all_gpus_are_shared_out(
    monkeypatch: pytest.MonkeyPatch, listing: str, shares: list[str | None]
) -> None:
    monkeypatch.delenv(gpus.VISIBLE_GPUS, raising=False)
    monkeypatch.setattr(gpus, "LIST_GPUS", ("no-such-program",) if listing == "nothing" else ("sh", "-c", listing))
    assert gpu_shares(2, 1) == shares


def test_too_few_gpus_are_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "listen", lambda *address: pytest.fail("it listens"))
    arguments = ["serve", "--model_path", "nowhere", "--replicas", "2"]
    result = CliRunner().invoke(cli, arguments, env={gpus.VISIBLE_GPUS: "3"})
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: --replicas 2: with 1 each they need 2 GPUs, and 1 are visible (3); start fewer, or set "
        "CUDA_VISIBLE_DEVICES"
    ]


class FakeProcess:
    """One that lives as long as its copy's list of lives says; `stop` ends it."""

    def __init__(self, base_url: str, life_s: float, error: str | None) -> None:
        self.base_url = base_url
        self._life_s, self._error = life_s, error
        self._stopped = asyncio.Event()

    async def wait(self) -> int:
        try:
            await asyncio.wait_for(self._stopped.wait(), self._life_s)
        except TimeoutError:
            return 2 if self._error else -9
        return 0

    def stop(self) -> None:
        self._stopped.set()

    def user_error(self) -> UserError | None:
        return UserError(self._error) if self._error else None


def run_copies(
    monkeypatch: pytest.MonkeyPatch, url: str, lives: list[tuple[float, str | None]], until: Callable[[Copies], bool]
) -> tuple[Copies, list[float]]:
    """One copy's lives, ended by `stop` as soon as `until` holds; also the pauses between them."""
    pauses: list[float] = []
    left = iter(lives)

    async def start() -> Any:
        return FakeProcess(url, *next(left))

    async def pause(self: Copies, seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.sleep(0)

    async def run() -> Copies:
        async with open_client() as client:
            copies = Copies([start], 8, client)
            running = asyncio.create_task(copies.run())
            while not (running.done() or until(copies)):
                await asyncio.sleep(0.01)
            copies.stop()
            await running
            return copies

    monkeypatch.setattr(Copies, "_pause", pause)
    return asyncio.run(run()), pauses


def test_a_copy_that_dies_is_started_again_after_a_growing_pause(
    monkeypatch: pytest.MonkeyPatch, serve_app: Callable[..., str]
) -> None:
    url = serve_app(FakeCopy(fine).app())
    lives = [*[(0.0, None)] * 8, (3600.0, None)]
    copies, pauses = run_copies(monkeypatch, url, lives, lambda copies: bool(copies.replicas.all))
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert copies.restarts == 8 and copies.replicas.all == []


def test_one_that_was_ready_for_long_is_started_again_at_once(
    monkeypatch: pytest.MonkeyPatch, serve_app: Callable[..., str]
) -> None:
    monkeypatch.setattr(copies_module, "QUICK_S", 0.2)
    url = serve_app(FakeCopy(fine).app())
    lives = [(0.0, None), (2.0, "moved away"), (3600.0, None)]
    _, pauses = run_copies(monkeypatch, url, lives, lambda copies: copies.restarts == 2 and bool(copies.replicas.all))
    assert pauses == [1, 0], "and what a copy cannot load once another could, is only logged"


def test_a_model_that_cannot_be_loaded_ends_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such folder"):
        run_copies(monkeypatch, NOBODY, [(0.0, None), (0.0, "no such folder")], lambda copies: False)


def test_the_front_names_the_routes_of_the_policy_service() -> None:
    assert {*front_app.ROUTES} == {"/generate", *OPENAI_ROUTES, *SCORE_ROUTES}
