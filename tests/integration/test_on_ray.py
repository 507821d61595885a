"""`xbai serve-on-ray` with two copies on one machine, of which one is killed under load and replaced."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from seeded_questions import SEEDS, question, right_answers, said

pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

PATIENCE_S = 400.0
COPY = "ServeReplica:xbai"
"""How Ray calls a process of a copy."""


class OnRay:
    """The command, and its copies' processes."""

    def __init__(self, model: Path, port: int, folder: Path, *options: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        command = [sys.executable, "-c", "from xbai.cli import app; app()", "serve-on-ray", "--model_path", str(model)]
        given = ["--engine", "hf", "--port", str(port), "--log_format", "text", "--cpus_per_replica", "0.1", *options]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment["OMP_NUM_THREADS"] = "1"
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen([*command, *given], stdout=stream, stderr=stream, env=environment)

    def processes(self) -> list[psutil.Process]:
        """What it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def copies(self) -> list[psutil.Process]:
        """Those that serve a model."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [process] if COPY in " ".join(process.cmdline()) else []
        return found

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            said = self.log.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S:g} s\n{said}"
            assert self.process.poll() is None, said
            time.sleep(0.2)

    def wait_ready(self) -> None:
        self.wait_for(lambda: "listening on" in self.log.read_text(encoding="utf-8"), "it listens")

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(PATIENCE_S)


@pytest.fixture
def start(tiny_model_dir: Path, reserve_port: Callable[[], int], tmp_path: Path) -> Iterator[Callable[..., OnRay]]:
    started: list[OnRay] = []

    def start(*options: str, model: Path = tiny_model_dir) -> OnRay:
        started.append(OnRay(model, reserve_port(), tmp_path, *options))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            for process in one.processes():
                process.kill()
        one.process.kill()
        one.process.wait()


@pytest.fixture(scope="module")
def right(tiny_model_dir: Path) -> list[str]:
    """What one engine answers to each seed."""
    return right_answers(tiny_model_dir)


def test_a_copy_that_is_killed_is_replaced(start: Callable[..., OnRay], right: list[str]) -> None:
    service = start("--replicas", "2")
    service.wait_ready()
    before = service.copies()
    assert len(before) == 2
    stop = threading.Event()

    def load(worker: int) -> Counter[str]:
        ended: Counter[str] = Counter()
        with httpx.Client(base_url=service.url, timeout=PATIENCE_S) as client:
            while not stop.is_set():
                seed = ended.total() % SEEDS
                got = client.post("/v1/chat/completions", json=question(seed))
                if got.is_success:
                    ended["right" if said(got.json()) == right[seed] else "wrong"] += 1
                else:
                    ended[str(got.status_code)] += 1
        return ended

    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load, worker) for worker in range(4)]
        try:
            time.sleep(2)
            before[0].kill()
            service.wait_for(lambda: before[0] not in service.copies(), "it is dead")
            service.wait_for(lambda: len(service.copies()) == 2, "there is another")
            time.sleep(2)
        finally:
            stop.set()
        ended = sum((one.result() for one in loads), Counter())
    assert ended["wrong"] == 0
    assert ended["right"] >= 20
    # What Ray's own proxy answers for a copy that has died.
    assert ended.keys() <= {"right", "500"} and ended["500"] <= 4, "no more than were in flight"
    running = service.processes()
    assert service.end() == 0
    assert psutil.wait_procs(running, PATIENCE_S)[1] == []


def test_it_answers_as_the_server_does(start: Callable[..., OnRay]) -> None:
    service = start("--api_key", "secret", "--max_replicas", "2", "--served_model_name", "wise")
    service.wait_ready()
    assert httpx.get(f"{service.url}/ready").status_code == 401
    with httpx.Client(base_url=service.url, headers={"Authorization": "Bearer secret"}, timeout=PATIENCE_S) as client:
        assert client.get("/ready").json()["status"] == "ready"
        assert client.get("/v1/models").json()["data"][0]["id"] == "wise"
        assert "text/html" in client.get("/").headers["content-type"]
        wrong = client.post("/v1/chat/completions", json={**question(0), "reasoning_effort": "endless"})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "reasoning_effort")
        body = {**question(0), "stream": True, "reasoning_effort": "low"}
        with client.stream("POST", "/v1/chat/completions", json=body) as stream:
            events = "".join(stream.iter_text())
        assert events.endswith("data: [DONE]\n\n") and events.startswith("data: ")
        assert len(client.post("/score", json={"text": "a", "return_all_scores": True}).json()) > 1
    assert service.end() == 0


def test_copies_follow_the_candidates(start: Callable[..., OnRay]) -> None:
    service = start("--max_replicas", "2", "--target_candidates", "4")
    service.wait_ready()
    assert len(service.copies()) == 1
    stop = threading.Event()

    def ask() -> None:
        # One request, but eight candidates.
        while not stop.is_set():
            body = {**question(0), "reasoning_effort": "medium", "max_tokens": 200}
            httpx.post(f"{service.url}/v1/chat/completions", json=body, timeout=PATIENCE_S)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            service.wait_for(lambda: len(service.copies()) == 2, "there is another copy")
        finally:
            stop.set()
        asking.result()
    assert service.end() == 0


def test_a_model_that_cannot_be_loaded_is_one_line(
    start: Callable[..., OnRay], tiny_model_dir: Path, tmp_path: Path
) -> None:
    def refusal(model: Path) -> str:
        service = start(model=model)
        assert service.process.wait(PATIENCE_S) == 2
        return service.log.read_text(encoding="utf-8").splitlines()[-1]

    assert "nothing/config.json: no such file" in refusal(tmp_path / "nothing")
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"cut off")
    assert refusal(folder).startswith(f"error: Ray Serve: {folder}/model.safetensors: cut off, or no safetensors file")
