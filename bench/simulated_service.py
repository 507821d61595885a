"""A policy and score service that takes time, slots and requests like a real one, but computes nothing.

    python bench/simulated_service.py --port 8000 [--slots 8] [--mean_s 2] [--record FILE]

How long a request takes follows from its prompt and seed alone (see `latency_s`), so that the work of a benchmark is
known before it is done, whoever does it. With all slots taken the answer is 429. Every answer is a line in FILE.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer
import uvicorn

QUESTION_SPREAD, SAMPLE_SPREAD = 0.4, 0.45
"""Of the logarithm of the latency: some questions take longer than others, and so do some responses to each."""

MODEL = {"model": "simulated", "scores": False, "lang": "en"}


def latency_s(prompt: str, seed: int | None, mean_s: float) -> float:
    """Log-normal with the given mean; the same for the same prompt and seed."""
    question, sample = random.Random(prompt).gauss(), random.Random(seed).gauss()
    shift = -(QUESTION_SPREAD**2 + SAMPLE_SPREAD**2) / 2
    return mean_s * math.exp(shift + QUESTION_SPREAD * question + SAMPLE_SPREAD * sample)


class SimulatedService:
    """The ASGI application."""

    def __init__(self, slots: int, mean_s: float, record: BinaryIO | None) -> None:
        self._slots = slots
        self._mean_s = mean_s
        self._record = record
        self._busy = 0

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        if scope["path"] == "/ready":
            await _answer(send, 200, {"status": "ready", **MODEL})
        elif self._busy >= self._slots:
            await _answer(send, 429, {"detail": "the queue is full"}, (b"retry-after", b"1"))
        else:
            self._busy += 1
            try:
                await self._work(scope["path"], receive, send)
            finally:
                self._busy -= 1

    async def _work(self, path: str, receive: Callable, send: Callable) -> None:
        body = json.loads(await _body(receive))
        if path == "/score":
            await asyncio.sleep(self._mean_s / 10)
            await _answer(send, 200, {"value": random.Random(body["text"]).random(), "all_scores": [0.5]})
            return
        work = asyncio.create_task(asyncio.sleep(latency_s(body["prefix_prompt"], body["seed"], self._mean_s)))
        gone = asyncio.create_task(receive())
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not work.done():
            work.cancel()
            return
        if self._record is not None:
            self._record.write(f"{body['seed']}\n".encode())
        count = body["response_num"]
        texts = [f"{body['seed']}/{number}: \\boxed{{{body['seed'] % 10}}}" for number in range(count)]
        await _answer(send, 200, {"results": texts, "token_counts": [20] * count, "finish_reasons": ["stop"] * count})


async def _body(receive: Callable[[], Awaitable[dict[str, Any]]]) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def _answer(send: Callable, status: int, answer: dict[str, Any], *headers: tuple[bytes, bytes]) -> None:
    headers = ((b"content-type", b"application/json"), *headers)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


def main(
    port: Annotated[int, typer.Option("--port")],
    slots: Annotated[int, typer.Option("--slots", min=1)] = 8,
    mean_s: Annotated[float, typer.Option("--mean_s", min=0)] = 2.0,
    record: Annotated[Path | None, typer.Option("--record")] = None,
) -> None:
    """Serve until killed."""
    stream = None if record is None else record.open("ab", buffering=0)
    uvicorn.run(SimulatedService(slots, mean_s, stream), port=port, log_level="error", lifespan="off", ws="none")


if __name__ == "__main__":
    typer.run(main)
