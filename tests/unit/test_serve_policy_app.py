"""The policy service around an engine whose pace the test decides, over real sockets."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from clocks import wait_until
from fastapi import FastAPI
from torch import Tensor

from xbai.engine import Completion, Engine
from xbai.engine.files import ModelOptions
from xbai.engine.sample import Sample
from xbai.engine.weight_check import HeldWeight
from xbai.errors import UserError
from xbai.seeds import sample_seed
from xbai.serve import server
from xbai.serve.engine_thread import EngineThread
from xbai.serve.limits import Limits
from xbai.serve.monitoring import RequestMiddleware
from xbai.serve.policy import create_policy_app


class GatedEngine(Engine):
    """Echoes `limit` prompts a step once `gate` is open; `failure` is what its next step raises."""

    def __init__(self, folder: Path) -> None:
        super().__init__(ModelOptions(folder, max_model_len=64))
        self.max_num_seqs = 32
        self.gate = threading.Event()
        self.failure: Exception | None = None
        self.refused: int | None = None
        self.limit = 1024
        self.queued: list[Sample] = []
        self.done: list[Sample] = []

    def watch(self, on_failure: Callable[[], None]) -> None:
        self.on_failure = on_failure

    def _enqueue(self, sample: Sample) -> None:
        if sample.index == self.refused:
            raise UserError("not this one")
        self.queued.append(sample)

    def _advance(self) -> list[tuple[Sample, Completion]]:
        if self.failure is not None:
            raise self.failure
        if not self.gate.wait(0.01):
            return []
        done, self.queued = self.queued[: self.limit], self.queued[self.limit :]
        self.done += done
        return [(sample, Completion(sample.prompt_ids, self._text(sample), "stop")) for sample in done]

    def token_ids(self, sample: Sample) -> Sequence[int]:
        return ()

    def _so_far(self, sample: Sample) -> Completion:
        return Completion([], "", "pruned")

    def _text(self, sample: Sample) -> str:
        return f"{self.tokenizer.decode(sample.prompt_ids)}/{sample.index}"

    def _drop(self, samples: list[Sample]) -> None:
        self.queued = [sample for sample in self.queued if sample not in samples]

    def _load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        raise RuntimeError("there are no weights")

    def _held_weights(self) -> dict[str, HeldWeight]:
        return {}


Start = Callable[..., tuple[str, GatedEngine, EngineThread]]


@pytest.fixture
def start(serve_app: Callable[[FastAPI], str], tiny_model_dir: Path) -> Start:
    def start_policy(limits: Limits | None = None, model_name: str = "gated") -> tuple[str, GatedEngine, EngineThread]:
        engine = GatedEngine(tiny_model_dir)
        thread = EngineThread(lambda: engine)
        app = create_policy_app(thread, model_name, limits or Limits())
        engine.service = app.state.service
        url = serve_app(app)
        wait_until(lambda: thread.ready, "the engine is loaded")
        return url, engine, thread

    return start_policy


def generate(url: str, prompt: str = "hello", **fields: object) -> httpx.Response:
    return httpx.post(f"{url}/generate", json={"prefix_prompt": prompt, **fields})


def leave(url: str, engine: GatedEngine, responses: int) -> None:
    """Ask, and hang up once the engine is at work on it."""
    body = json.dumps({"prefix_prompt": "x", "response_num": responses}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with connect(url) as client:
        client.sendall(f"{head}\r\n\r\n".encode() + body)
        wait_until(lambda: engine.queued, "the request has come")


def test_concurrent_requests_get_their_own_answers(start: Start) -> None:
    url, engine, _ = start()
    with ThreadPoolExecutor(16) as clients:
        answers = [clients.submit(generate, url, f"prompt {i}", response_num=2) for i in range(16)]
        wait_until(lambda: len(engine.queued) == 32, "32 samples are at work")
        engine.gate.set()
    for i, answer in enumerate(answers):
        assert answer.result().json()["results"] == [f"prompt {i}/0", f"prompt {i}/1"]


def test_a_full_queue_is_429_with_retry_after(start: Start) -> None:
    url, engine, _ = start(Limits(max_pending=4))
    with ThreadPoolExecutor(1) as clients:
        running = clients.submit(generate, url, response_num=3)
        wait_until(lambda: len(engine.queued) == 3, "3 samples are at work")
        refused = generate(url, response_num=2)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert "queue is full" in refused.json()["detail"]
        engine.gate.set()
        assert running.result().status_code == 200
    assert generate(url, response_num=9).status_code == 200, "an idle service takes a request beyond its limit"


def test_time_out_is_504_and_frees_the_work(start: Start) -> None:
    url, engine, _ = start(Limits(request_timeout_s=0.3))
    answer = generate(url)
    assert (answer.status_code, answer.json()["detail"]) == (504, "no answer within 0.3 s")
    wait_until(lambda: not engine.queued, "the work is dropped")


def test_a_client_that_leaves_frees_its_work(start: Start) -> None:
    url, engine, _ = start()
    leave(url, engine, responses=5)
    wait_until(lambda: not engine.queued, "the work is dropped")
    wait_until(lambda: "xbai_queue_items 0.0" in httpx.get(f"{url}/metrics").text, "nothing is queued")
    engine.gate.set()
    assert generate(url).status_code == 200


@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), UserError("not a loading error")])
def test_a_dead_engine_fails_its_clients_and_its_health(start: Start, failure: Exception) -> None:
    url, engine, thread = start()
    with ThreadPoolExecutor(1) as clients:
        running = clients.submit(generate, url)
        wait_until(lambda: engine.queued, "the request has come")
        engine.failure = failure
        assert running.result().status_code == 503
    wait_until(lambda: not thread.running, "the thread ends")
    assert httpx.get(f"{url}/health").status_code == 503
    assert httpx.get(f"{url}/ready").status_code == 503
    assert generate(url).status_code == 503
    assert thread.error is failure
    assert thread.loading_error is None, "else the service would exit as one that was started wrongly"


def test_what_the_engine_refuses_is_its_own_requests_end_only(start: Start) -> None:
    url, engine, thread = start()
    with ThreadPoolExecutor(1) as clients:
        accepted = clients.submit(generate, url, response_num=2)
        wait_until(lambda: len(engine.queued) == 2, "2 samples are at work")
        engine.refused = 3
        refused = generate(url, "other", response_num=40)
        assert (refused.status_code, refused.json()["detail"]) == (422, "not this one")
        wait_until(
            lambda: (len(thread.queue), len(thread.begun), len(engine.queued)) == (0, 2, 2),
            "the refused samples go",
        )
        engine.gate.set()
        assert accepted.result().json()["results"] == ["hello/0", "hello/1"]


def test_a_bug_is_a_500_that_the_log_explains(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    url, engine, _ = start()
    engine.gate.set()
    engine._text = lambda sample: None
    answer = httpx.post(f"{url}/generate", json={"prefix_prompt": "x"}, headers={"X-Request-Id": "mine"})
    assert (answer.status_code, answer.headers["X-Request-Id"]) == (500, "mine")
    assert answer.json()["detail"].startswith("internal error (ValidationError)")
    (bug,) = (record for record in caplog.records if record.exc_info)
    assert bug.fields["request_id"] == "mine"
    assert 'xbai_requests_total{route="/generate",status="500"} 1.0' in httpx.get(f"{url}/metrics").text


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        (b"{", 422, "JSON decode error"),
        (b'{"prefix_prompt": "\xff"}', 422, "not valid UTF-8"),
        (b'{"prefix_prompt": "x", "temperature": NaN}', 422, "temperature: Input should be a finite number"),
        (b'{"prefix_prompt": "' + b"x" * 200 + b'"}', 413, "200 tokens"),
        (b'{"prefix_prompt": "' + b"x" * 4000 + b'"}', 413, "larger than 2000 bytes"),
        (b'{"prefix_prompt": "x", "return_scores": true}', 422, "no score head"),
        (b'{"prefix_prompt": "x", "stop_token_ids": [1, 999999999]}', 422, "stop_token_ids: 999999999 is outside"),
        (b'{"prefix_prompt": "x", "stop": ["y", "<|im_end|>\\n"]}', 422, "id 258 in stop_token_ids"),
    ],
)
def test_bad_requests_say_what_is_wrong(start: Start, body: bytes, status: int, detail: str) -> None:
    url, engine, _ = start(Limits(max_body_bytes=2000))
    engine.gate.set()
    answer = httpx.post(f"{url}/generate", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert detail in answer.json()["detail"]


def test_a_body_without_length_is_bounded_too(start: Start) -> None:
    url, _, _ = start(Limits(max_body_bytes=2000))
    chunks = (b"x" * 500 for _ in range(10))
    answer = httpx.post(f"{url}/generate", content=chunks, headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_bodies_together_are_bounded(start: Start) -> None:
    url, engine, _ = start(Limits(max_body_bytes=2000, max_bodies_bytes=1000))
    engine.gate.set()
    middleware = engine.service.app.middleware_stack
    while not isinstance(middleware, RequestMiddleware):
        middleware = middleware.app
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2000\r\n\r\n"
    with connect(url) as first, connect(url) as second:
        first.sendall(head + b" " * 1500)
        wait_until(lambda: middleware._bodies_bytes == 1500, "the first body has come")
        second.sendall(head + b" ")
        answer = second.recv(1000)
        assert answer.startswith(b"HTTP/1.1 429 ") and b"retry-after: " in answer
        first.sendall(b'{"prefix_prompt": "x"}'.rjust(500))
        assert first.recv(1000).startswith(b"HTTP/1.1 200 "), "one body alone may be larger"
    assert generate(url).is_success


def test_requests_are_named_and_counted(start: Start) -> None:
    url, engine, _ = start()
    engine.gate.set()
    answer = httpx.post(f"{url}/generate", json={"prefix_prompt": "ab"}, headers={"X-Request-Id": "mine"})
    assert answer.headers["X-Request-Id"] == "mine"
    metrics = httpx.get(f"{url}/metrics").text
    assert 'xbai_requests_total{route="/generate",status="200"} 1.0' in metrics
    assert "xbai_generated_tokens_total 16.0" in metrics
    assert 'xbai_responses_total{finish_reason="stop"} 8.0' in metrics


def test_a_large_request_does_not_keep_the_others_waiting(start: Start) -> None:
    url, engine, _ = start()
    with ThreadPoolExecutor(2) as clients:
        large = clients.submit(generate, url, "large", response_num=1024)
        wait_until(lambda: len(engine.queued) == 32, "32 samples are at work")
        small = clients.submit(generate, url, "small")
        wait_until(
            lambda: "xbai_engine_samples_waiting 1000.0" in httpx.get(f"{url}/metrics").text, "1000 samples wait"
        )
        engine.limit = 1
        engine.gate.set()
        assert small.result().json()["results"] == [f"small/{i}" for i in range(8)]
        assert large.result().json()["results"] == [f"large/{i}" for i in range(1024)]
    turns = [
        number for number, sample in enumerate(engine.done) if sample.prompt_ids == engine.tokenizer.encode("small")
    ]
    assert turns[-1] < 60, "its eight samples took turns with those of the large one"


def test_leaving_frees_what_waits_and_what_has_begun(start: Start) -> None:
    url, engine, thread = start()
    leave(url, engine, responses=500)
    wait_until(lambda: (len(thread.queue), len(thread.begun), len(engine.queued)) == (0, 0, 0), "the work is dropped")


def test_samples_of_a_request_have_the_seeds_of_one_engine_request(start: Start) -> None:
    url, engine, _ = start()
    with ThreadPoolExecutor(1) as clients:
        answer = clients.submit(generate, url, seed=7, response_num=3)
        wait_until(lambda: len(engine.queued) == 3, "3 samples are at work")
        assert [sample.seed for sample in engine.queued] == [sample_seed(7, i) for i in range(3)]
        engine.gate.set()
        assert answer.result().is_success


def test_a_dead_worker_fails_clients_though_the_engine_hangs(start: Start) -> None:
    url, engine, thread = start()
    with ThreadPoolExecutor(1) as clients:
        running = clients.submit(generate, url)
        wait_until(lambda: engine.queued, "the request has come")
        engine.on_failure()
        assert running.result().status_code == 503
    assert httpx.get(f"{url}/health").status_code == 503
    assert "worker process" in str(thread.error)


def test_a_stop_finishes_what_was_accepted_and_takes_no_more(start: Start) -> None:
    url, engine, _ = start()
    service = engine.service
    with ThreadPoolExecutor(1) as clients:
        running = clients.submit(generate, url)
        wait_until(lambda: engine.queued, "the request has come")
        service.stop()
        refused = generate(url)
        assert (refused.status_code, refused.json()["detail"]) == (503, "the service is stopping")
        assert int(refused.headers["Retry-After"]) >= 1
        assert httpx.get(f"{url}/ready").status_code == 503
        assert httpx.get(f"{url}/health").status_code == 200
        assert not service.finished()
        engine.gate.set()
        assert running.result().status_code == 200
    wait_until(service.finished, "the service has finished")


def test_a_stop_has_an_end(start: Start) -> None:
    url, engine, thread = start(Limits(shutdown_timeout_s=0.2))
    service = engine.service
    with ThreadPoolExecutor(1) as clients:
        running = clients.submit(generate, url)
        wait_until(lambda: engine.queued, "the request has come")
        service.stop()
        loop = service._end.get_loop()
        assert not service.finished()
        time.sleep(0.25)
        loop.call_soon_threadsafe(service.finished)
        answer = running.result()
        assert (answer.status_code, answer.json()["detail"]) == (503, "the service stopped before the answer")
    wait_until(service.finished, "the service has finished")
    assert thread.error is None


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "secret"}, 401),
        ({"Authorization": "Bearer secret"}, 200),
    ],
)
def test_the_key_is_asked_for(start: Start, header: dict[str, str], status: int) -> None:
    url, engine, _ = start(Limits(api_key="secret"))
    engine.gate.set()
    answer = httpx.post(f"{url}/generate", json={"prefix_prompt": "x"}, headers=header)
    assert answer.status_code == status
    assert answer.headers.get("WWW-Authenticate") == ("Bearer" if status == 401 else None)
    for path in ("/ready", "/metrics", "/openapi.json", "/nowhere"):
        assert (httpx.get(url + path, headers=header).status_code == 401) == (status == 401)
    assert httpx.get(f"{url}/health").status_code == 200


def test_without_the_key_no_path_is_shown(start: Start, tiny_model_dir: Path) -> None:
    key = {"Authorization": "Bearer secret"}
    url, engine, thread = start(Limits(api_key="secret"), str(tiny_model_dir))
    assert httpx.get(f"{url}/health", headers=key).json()["model"] == str(tiny_model_dir)
    assert httpx.get(f"{url}/health").json()["model"] == tiny_model_dir.name
    engine.failure = RuntimeError(f"{tiny_model_dir}/model.safetensors: gone")
    assert httpx.post(f"{url}/generate", json={"prefix_prompt": "x"}, headers=key).status_code == 503
    wait_until(lambda: not thread.running, "the thread ends")
    assert str(tiny_model_dir) in httpx.get(f"{url}/health", headers=key).json()["detail"]
    assert httpx.get(f"{url}/health").json() == {"detail": "the engine is dead"}
    for method, path in (
        ("GET", "/health"),
        ("POST", "/health"),
        ("GET", "//health"),
        ("GET", "/health/"),
        ("GET", "/docs"),
        ("POST", "/generate"),
        ("GET", "/%2e%2e/health"),
        ("HEAD", "/health"),
    ):
        answer = httpx.request(method, url + path, content=b"{", headers={"Authorization": "Bearer wrong"})
        assert "/" not in answer.text, answer.text


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60)


def test_slow_clients_are_cut_off(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_TIMEOUT_S", 0.6)
    url, engine, _ = start(Limits(receive_timeout_s=0.6))
    with connect(url) as silent, connect(url) as slow_head, connect(url) as slow_body:
        slow_head.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        slow_body.sendall(
            b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        assert silent.recv(100) == b""
        assert slow_head.recv(100) == b""
        assert slow_body.recv(100).startswith(b"HTTP/1.1 408 ")
    with connect(url) as kept:
        for _ in range(2):
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert kept.recv(1000).startswith(b"HTTP/1.1 200 ")
            time.sleep(0.7)
    engine.gate.set()
    assert generate(url).is_success


def test_clients_that_do_not_read_are_cut_off(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "READ_TIMEOUT_S", 2.0)
    url, engine, _ = start()
    engine.gate.set()
    engine._text = lambda sample: "x" * (8 << 20)
    request = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 22\r\n\r\n"
    with connect(url) as silent, connect(url) as slow:
        for client in (silent, slow):
            client.sendall(request + b'{"prefix_prompt": "x"}')
        received = 0
        for _ in range(8):
            time.sleep(0.3)
            received += len(slow.recv(2 << 20, socket.MSG_WAITALL))
        while received < 64 << 20:
            part = slow.recv(1 << 20)
            assert part, "cut off, though it read on"
            received += len(part)
        left = 0
        while part := silent.recv(1 << 20):
            left += len(part)
        assert left < 32 << 20, "more than what the kernel had taken over"
    assert httpx.get(f"{url}/health").is_success


def test_a_request_is_one_log_line(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    url, engine, _ = start()
    engine.gate.set()
    with caplog.at_level("INFO", "xbai.serve.monitoring"):
        for request_id in (b"mine", b"not mine\t\xff"):
            httpx.post(f"{url}/generate", json={"prefix_prompt": "ab"}, headers={"X-Request-Id": request_id})
        wait_until(lambda: len(caplog.records) == 2, "two lines are logged")
    first, second = (record.fields for record in caplog.records)
    assert first.pop("seconds") > 0
    assert first == {
        "request_id": "mine",
        "route": "/generate",
        "status": 200,
        "responses": 8,
        "prompt_tokens": 2,
        "tokens": 16,
    }
    assert second["request_id"].isalnum()
