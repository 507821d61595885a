"""The policy service around an engine whose pace the test decides, over real sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi import FastAPI
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config

from xbai.engine import Completion, Engine
from xbai.engine.base import Sample
from xbai.engine.weight_check import HeldWeight
from xbai.serve.engine_thread import EngineThread
from xbai.serve.limits import Limits
from xbai.serve.policy import create_policy_app


class GatedEngine(Engine):
    """Echoes each prompt once `gate` is open; `explode` makes its next step fail."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(Qwen3Config(vocab_size=len(tokenizer)), tokenizer, max_model_len=64, scorer=None)
        self.max_num_seqs = 32
        self.gate = threading.Event()
        self.explode = False
        self.queued: list[Sample] = []

    def _enqueue(self, samples: list[Sample]) -> None:
        self.queued += samples

    def _advance(self) -> list[tuple[Sample, Completion]]:
        if self.explode:
            raise RuntimeError("out of memory")
        if not self.gate.wait(0.01):
            return []
        done, self.queued = self.queued, []
        return [(sample, Completion(sample.prompt_ids, self._text(sample), "stop")) for sample in done]

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
def start(serve_app: Callable[[FastAPI], str], tiny_tokenizer: PreTrainedTokenizerFast) -> Start:
    def start_policy(limits: Limits | None = None) -> tuple[str, GatedEngine, EngineThread]:
        engine = GatedEngine(tiny_tokenizer)
        thread = EngineThread(lambda: engine)
        url = serve_app(create_policy_app(thread, "gated", limits or Limits()))
        wait_until(lambda: thread.ready)
        return url, engine, thread

    return start_policy


def wait_until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.01)


def generate(url: str, prompt: str = "hello", **fields: object) -> httpx.Response:
    return httpx.post(f"{url}/generate", json={"prefix_prompt": prompt, **fields}, timeout=30)


def test_concurrent_requests_get_their_own_answers(start: Start) -> None:
    url, engine, _ = start()
    with ThreadPoolExecutor(16) as clients:
        answers = [clients.submit(generate, url, f"prompt {i}", response_num=2) for i in range(16)]
        wait_until(lambda: len(engine.queued) == 32)
        engine.gate.set()
    for i, answer in enumerate(answers):
        assert answer.result().json()["results"] == [f"prompt {i}/0", f"prompt {i}/1"]


def test_a_full_queue_is_429_with_retry_after(start: Start) -> None:
    url, engine, _ = start(Limits(max_pending=4))
    with ThreadPoolExecutor(1) as clients:
        running = clients.submit(generate, url, response_num=3)
        wait_until(lambda: len(engine.queued) == 3)
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
    wait_until(lambda: not engine.queued)


def test_a_client_that_leaves_frees_its_work(start: Start) -> None:
    url, engine, _ = start()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/generate", json={"prefix_prompt": "x", "response_num": 5}, timeout=0.3)
    wait_until(lambda: not engine.queued)
    assert "xbai_queue_items 0.0" in httpx.get(f"{url}/metrics").text
    engine.gate.set()
    assert generate(url).status_code == 200


def test_a_dead_engine_fails_its_clients_and_its_health(start: Start) -> None:
    url, engine, thread = start()
    with ThreadPoolExecutor(1) as clients:
        running = clients.submit(generate, url)
        wait_until(lambda: engine.queued)
        engine.explode = True
        assert running.result().status_code == 503
    wait_until(lambda: not thread.running)
    assert httpx.get(f"{url}/health").status_code == 503
    assert httpx.get(f"{url}/ready").status_code == 503
    assert generate(url).status_code == 503
    assert isinstance(thread.error, RuntimeError)


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        (b"{", 422, "JSON decode error"),
        (b'{"prefix_prompt": "\xff"}', 422, "not valid UTF-8"),
        (b'{"prefix_prompt": "x", "temperature": NaN}', 422, "temperature: Input should be a finite number"),
        (b'{"prefix_prompt": "' + b"x" * 200 + b'"}', 413, "200 tokens"),
        (b'{"prefix_prompt": "' + b"x" * 4000 + b'"}', 413, "larger than 2000 bytes"),
        (b'{"prefix_prompt": "x", "return_scores": true}', 422, "no score head"),
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


def test_requests_are_named_and_counted(start: Start) -> None:
    url, engine, _ = start()
    engine.gate.set()
    answer = httpx.post(f"{url}/generate", json={"prefix_prompt": "ab"}, headers={"X-Request-Id": "mine"})
    assert answer.headers["X-Request-Id"] == "mine"
    metrics = httpx.get(f"{url}/metrics").text
    assert 'xbai_requests_total{route="/generate",status="200"} 1.0' in metrics
    assert "xbai_generated_tokens_total 16.0" in metrics
    assert 'xbai_responses_total{finish_reason="stop"} 8.0' in metrics
