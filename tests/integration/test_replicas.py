"""`xbai serve --replicas 2` with copies that are killed under load: what was answered is right, the rest is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from seeded_questions import SEEDS, question, right_answers, said

pytestmark = pytest.mark.slow

PATIENCE_S = 150.0
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


class ReplicatedService:
    """The front, and who its children are."""

    def __init__(self, model: Path, port: int, log: Path, replicas: int = 2) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [sys.executable, "-c", "from xbai.cli import app; app()", "serve", "--model_path", str(model)]
        options = ["--replicas", str(replicas), "--engine", "hf", "--port", str(port), "--log_format", "text"]
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [*command, *options], stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    def copies(self) -> list[int]:
        """Process ids."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text(encoding="utf-8")
        return [int(pid) for pid in listed.split()]

    def ready_copies(self) -> int:
        try:
            return httpx.get(f"{self.url}/health").json()["replicas_ready"]
        except httpx.TransportError:
            return 0

    def wait_ready(self, count: int = 2) -> None:
        wait_for(lambda: self.ready_copies() == count, f"{count} copies are ready", self.log)


def wait_for(condition: Callable[[], bool], what: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S:g} s\n{log.read_text(encoding='utf-8')}"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    """Whether it has not ended; whose child it was may be slow to ask for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def service(tiny_model_dir: Path, reserve_port: Callable[[], int], tmp_path: Path) -> Iterator[ReplicatedService]:
    """Two copies of the tiny model."""
    started = ReplicatedService(tiny_model_dir, reserve_port(), tmp_path / "log")
    yield started
    started.process.kill()
    started.process.wait()


@pytest.fixture(scope="module")
def right(tiny_model_dir: Path) -> list[str]:
    """What one engine answers to each seed."""
    return right_answers(tiny_model_dir)


def ask(client: httpx.Client, seed: int, stream: bool) -> str | None:
    """The whole answer; None for a refusal in good form. Anything else fails the test."""
    body = {**question(seed), **(STREAMED if stream else {})}
    got = client.post("/v1/chat/completions", json=body)
    if got.status_code == 503:
        assert got.headers["retry-after"] and got.json()["error"]["type"] == "server_error"
        return None
    assert got.status_code == 200, got.text
    if not stream:
        return said(got.json())
    events = [event.removeprefix("data: ") for event in got.text.split("\n\n") if event and not event.startswith(":")]
    if events[-1] != "[DONE]":
        assert json.loads(events[-1])["error"]["type"] == "server_error"
        return None
    deltas = [choice["delta"] for event in events[:-1] for choice in json.loads(event)["choices"]]
    return "".join(delta.get("reasoning", "") + delta.get("content", "") for delta in deltas)


def test_a_copy_killed_under_load_costs_its_own_requests_alone(service: ReplicatedService, right: list[str]) -> None:
    started = time.monotonic()
    service.wait_ready()
    start_s = time.monotonic() - started
    before = service.copies()
    assert len(before) == 2
    stop = threading.Event()
    unready: list[int] = []

    def load(worker: int) -> Counter[str]:
        ended: Counter[str] = Counter()
        with httpx.Client(base_url=service.url, timeout=PATIENCE_S) as client:
            while not stop.is_set():
                seed = ended.total() % SEEDS
                answer = ask(client, seed, stream=worker % 2 == 0)
                ended["refused" if answer is None else "right" if answer == right[seed] else "wrong"] += 1
        return ended

    def watch() -> int:
        with httpx.Client(base_url=service.url, timeout=PATIENCE_S) as client:
            while not stop.is_set():
                unready.extend([code] if (code := client.get("/ready").status_code) != 200 else [])
                time.sleep(0.05)
        return len(unready)

    with ThreadPoolExecutor(9) as pool:
        loads = [pool.submit(load, worker) for worker in range(8)]
        watcher = pool.submit(watch)
        try:
            time.sleep(2)
            os.kill(before[0], signal.SIGKILL)
            killed = time.monotonic()
            wait_for(lambda: service.ready_copies() == 1, "the copy is missed", service.log)
            service.wait_ready()
            back_s = time.monotonic() - killed
            time.sleep(1)
        finally:
            stop.set()
        ended = sum((one.result() for one in loads), Counter())
        assert watcher.result() == 0, "the service was ready all along"
    assert ended["wrong"] == 0
    assert ended["right"] >= 20
    assert ended["refused"] <= 8, "no more than were in flight"
    # Under load two cores are shared by more than at the start.
    assert back_s < 5 * start_s
    after = service.copies()
    assert before[1] in after and len(after) == 2

    answer_what_had_begun(service)
    assert service.process.wait(PATIENCE_S) == 0
    assert not any(map(is_running, after))


def answer_what_had_begun(service: ReplicatedService) -> None:
    """SIGTERM during a stream."""
    body = {**question(0), **STREAMED, "max_tokens": 400}
    with httpx.stream("POST", f"{service.url}/v1/chat/completions", json=body, timeout=PATIENCE_S) as got:
        events = got.iter_text()
        next(events)
        service.process.terminate()
        wait_for(lambda: httpx.get(f"{service.url}/ready").status_code == 503, "it is stopping", service.log)
        refused = httpx.post(f"{service.url}/v1/chat/completions", json=question(0))
        assert refused.status_code == 503 and "stopping" in refused.json()["error"]["message"]
        assert "".join(events).endswith("data: [DONE]\n\n")


def test_copies_end_with_the_front_however_it_ends(service: ReplicatedService) -> None:
    wait_for(lambda: len(service.copies()) == 2, "the copies are started", service.log)
    copies = service.copies()
    service.process.kill()
    service.process.wait()
    wait_for(lambda: not any(map(is_running, copies)), "the copies have ended", service.log)


def test_a_model_that_cannot_be_loaded_is_one_line(reserve_port: Callable[[], int], tmp_path: Path) -> None:
    service = ReplicatedService(tmp_path / "nothing", reserve_port(), tmp_path / "log", replicas=1)
    assert service.process.wait(PATIENCE_S) == 2
    lines = service.log.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [lines[-1]]
    assert "nothing/config.json: no such file" in lines[-1]
