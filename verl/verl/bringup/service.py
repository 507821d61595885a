"""The policy service in a process of its own: answers under load, and an end that frees the GPU."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from verl.bringup.machine import ROOT
from verl.bringup.step import Context, require, step
from verl.bringup.workload import model_folder_made_apart

START_S, STOP_S, ANSWER_S = 300.0, 60.0, 600.0
CLIENTS, REQUESTS = 32, 64


@step(
    means="The policy service refuses or loses requests under load, or does not end when told to: its log is the "
    "step's. `GET /metrics` shows what it does; limits are options of test/policy_model_queue.py.",
    needs=["fastapi", "uvicorn"],
    limit_s=900,
)
def service_under_load(context: Context) -> str:
    """32 clients of 8 responses a request (on CPU fewer), every answer whole; SIGTERM ends it within 60 s."""
    clients, requests, tokens = (CLIENTS, REQUESTS, 1024) if context.on_gpu else (4, 8, 32)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, str(ROOT / "test/policy_model_queue.py"), "--ip", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen([*command, "--model_path", str(model_folder_made_apart(context, None))])
    try:
        _wait_until_ready(process, port)
        body = {"prefix_prompt": "Make 10 from 7 8 1 1 5", "response_num": 8, "max_tokens": tokens, "stop": []}
        started = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            answers = list(pool.map(lambda seed: _generate(port, body | {"seed": seed}), range(requests)))
        seconds = time.perf_counter() - started
        require(all(len(answer["results"]) == 8 for answer in answers), "an answer has not all its responses")
        again = _generate(port, body | {"seed": 0})
        process.send_signal(signal.SIGTERM)
        started = time.perf_counter()
        status = process.wait(STOP_S)
        stopped = time.perf_counter() - started
    finally:
        process.kill()
        process.wait()
    require(status == 0, f"after SIGTERM it ended with status {status}")
    same = sum(one == other for one, other in zip(again["results"], answers[0]["results"], strict=True))
    return f"{requests / seconds:.2g} requests/s of 8 responses, {same}/8 the same alone; stopped in {stopped:.1f} s"


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
            return
        time.sleep(0.2)
    require(False, f"the service did not get ready (exit status {process.poll()})")


def _generate(port: int, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
        return json.load(response)
