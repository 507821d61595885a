"""Fixtures for the services: an application on a real socket, and the services' own processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from xbai.serve.server import server_config

REPOSITORY = Path(__file__).parents[1]
START_TIMEOUT_S = 240.0
QUIET_CPU = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture(scope="session", autouse=True)
def patient_clients() -> Iterator[None]:
    """httpx gives up after five seconds, which an answer may take where others use the cores."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("get", "post", "request"):
            patch.setattr(httpx, name, partial(getattr(httpx, name), timeout=60))
        yield


@pytest.fixture
def serve_app() -> Iterator[Callable[..., str]]:
    """`serve_app(app, listener=one of a free port) -> base URL`: the application, in a thread, until the test ends."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def serve(app: FastAPI, listener: socket.socket | None = None) -> str:
        listener = listener or socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(server_config(app))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        running.append((server, thread))
        deadline = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < deadline and thread.is_alive(), "the application does not start"
            time.sleep(0.01)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield serve
    for server, _ in running:
        server.should_exit = True
    for _, thread in running:
        thread.join(60)


class ServiceProcess:
    """One of the scripts under `test/`, running."""

    def __init__(self, script: str, arguments: list[str], port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [sys.executable, str(REPOSITORY / "test" / script), *arguments, "--port", str(port)]
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **QUIET_CPU}
            )

    def wait_ready(self) -> ServiceProcess:
        """Return when the model is loaded."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/ready").is_success:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"the service did not get ready within {START_TIMEOUT_S:.0f} s:\n{self._said()}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal the process and return its exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self, timeout_s: float = 200) -> int:
        """The exit status."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the service still runs after {timeout_s} s:\n{self._said()}") from None

    def _said(self) -> str:
        return self.log.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def reserve_port() -> Iterator[Callable[[], int]]:
    """`reserve_port() -> port`: until the end of the test module only who is told of it listens there."""
    with contextlib.ExitStack() as bound:

        def reserve() -> int:
            holder = bound.enter_context(socket.socket())
            # As servers do: several sockets may then be bound to the port while none listens.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", 0))
            return holder.getsockname()[1]

        yield reserve


@pytest.fixture(scope="module")
def start_service(
    reserve_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., ServiceProcess]]:
    """`start_service(script, *arguments) -> ServiceProcess`, ended with the test module."""
    started: list[ServiceProcess] = []

    def start(script: str, *arguments: str) -> ServiceProcess:
        log = tmp_path_factory.mktemp("service") / f"{script}.log"
        started.append(ServiceProcess(script, list(arguments), reserve_port(), log))
        return started[-1]

    yield start
    for service in started:
        if service.process.poll() is None:
            service.process.kill()
            service.process.wait()
