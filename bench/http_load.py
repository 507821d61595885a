"""A service in its own process on a real socket, and clients that never pause."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
MIB = 2**20


@dataclass(frozen=True)
class ServiceProcess:
    """A running service, its model loaded."""

    url: str
    pid: int
    device_bytes_before: int

    def peak_memory_mib(self) -> dict[str, int]:
        """Most resident memory so far; and on a GPU what the device has lost to it (torch keeps what it once took)."""
        lines = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8").splitlines()
        kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        peak = {"resident": kilobytes * 1024 // MIB}
        if torch.cuda.is_available():
            peak["gpu"] = (_device_bytes_in_use() - self.device_bytes_before) // MIB
        return peak


@contextmanager
def running_service(command: Sequence[str], log: Path) -> Iterator[ServiceProcess]:
    """Start `command`, which takes `--port`, wait until it is ready, and stop it at the end.

    Raises:
        RuntimeError: it does not get ready.
    """
    before = _device_bytes_in_use()
    port = free_port()
    process = start_service(command, port, log)
    try:
        wait_until_ready(process, port, log)
        yield ServiceProcess(f"http://127.0.0.1:{port}", process.pid, before)
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def start_service(command: Sequence[str], port: int, log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start `command`, which takes `--port`; what it says is added to `log`."""
    with log.open("ab") as stream:
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
        return subprocess.Popen([*command, "--port", str(port)], stdout=stream, stderr=stream, env=variables)


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Return when its model is loaded.

    Raises:
        RuntimeError: it does not get ready.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ready").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(
        f"the service did not get ready: {' '.join(process.args)}\n{log.read_text(encoding='utf-8')[-4000:]}"
    )


def _device_bytes_in_use() -> int:
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


@dataclass(frozen=True)
class Load:
    """What clients met.

    Attributes:
        seconds: from the first request to the last answer.
        latencies: seconds of each request, and `answers` what it got, in the order of the requests.
    """

    seconds: float
    latencies: list[float]
    answers: list[dict[str, Any]]

    @property
    def per_second(self) -> float:
        """Requests answered."""
        return len(self.answers) / self.seconds

    def quantile(self, share: float) -> float:
        """Seconds within which that share of the requests was answered."""
        return float(np.quantile(self.latencies, share))


def press(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> Load:
    """Put all requests to a route; each client sends its next one as soon as it has the answer to the last.

    Raises:
        httpx.HTTPStatusError: a request was refused.
    """
    return asyncio.run(_press(url, bodies, clients))


async def _press(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> Load:
    latencies, answers = [0.0] * len(bodies), [{}] * len(bodies)
    waiting = iter(enumerate(bodies))
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(limits=limits, timeout=None) as http:

        async def client() -> None:
            for number, body in waiting:
                began = time.perf_counter()
                response = await http.post(url, json=body)
                response.raise_for_status()
                answers[number] = response.json()
                latencies[number] = time.perf_counter() - began

        started = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(clients):
                tasks.create_task(client())
        return Load(time.perf_counter() - started, latencies, answers)
