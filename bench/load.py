"""What many impatient clients and dying processes do to the services, and whether anybody gets a wrong answer for it.

    python bench/load.py [--seconds 120] [--clients 64] [--kills 4] [--engine hf] [--model_path DIR] [--out FILE]

`--clients` clients of each service repeat requests whose answers are known from a quiet service, leave in the middle of
some, and look at every answer; meanwhile each service is killed (SIGKILL) and started again `--kills` times. Every
request has an id of its own, which the service's log counts. The last line is one JSON object; the exit status is 1
when an answer was wrong or given twice, a client hung, or a failure came from a service that nobody had killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from http_load import free_port, start_service, wait_until_ready
from machine import ROOT, describe_machine, report

from xbai.benchmarks.tiny_model import write_tiny_model
from xbai.engine.files import read_config
from xbai.errors import UserError, exit_on_user_error
from xbai.model_folder import load_tokenizer
from xbai.sprm import ScoreHead, SPRMConfig, StepRule, save_score_head

ANSWER_TIMEOUT_S = 60.0
LEAVES = 0.15
"""How many of the requests their client abandons."""
BUSY = (429, 503, 504)
LOG_DELAY_S = 1.0
SCORE_TOLERANCE = 1e-4
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
QUIET_CPU = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass
class Service:
    """One of the scripts under `test/`: its process, the requests put to it and what became of them."""

    name: str
    command: list[str]
    port: int
    log: Path
    route: str
    bodies: list[dict[str, Any]]
    expected: list[Any] = field(default_factory=list)
    process: subprocess.Popen | None = None
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    answered: dict[str, float] = field(default_factory=dict)
    """When each answer was read."""
    problems: list[str] = field(default_factory=list)
    memory: list[list[float]] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    ready_at: float = 0.0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Start a process and wait until its model is loaded."""
        self.process = start_service(self.command, self.port, self.log, **QUIET_CPU)
        await asyncio.to_thread(wait_until_ready, self.process, self.port, self.log)
        self.memory.append([])
        self.ready_at = time.monotonic()

    async def kill_and_restart(self) -> None:
        """What a machine's out-of-memory killer and its supervisor do."""
        self.kills.append(time.monotonic())
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        await self.start()

    @property
    def killed_at(self) -> float:
        """When the last kill was."""
        return self.kills[-1] if self.kills else 0.0

    def was_killed_since(self, moment: float) -> bool:
        """Whether a request that began then may have met a dead or starting process."""
        return self.killed_at >= moment or self.ready_at < self.killed_at or self.ready_at >= moment

    def watch_memory(self) -> None:
        """Note the resident memory of the present process, in MiB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="utf-8").split()[1])
        self.memory[-1].append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)

    def growth_mib(self) -> float:
        """Most that a process grew from the second to the last quarter of its life under load."""
        growths = [
            statistics.median(life[-len(life) // 4 :]) - statistics.median(life[len(life) // 4 : len(life) // 2])
            for life in self.memory
            if len(life) >= 8
        ]
        return max(growths, default=0.0)

    def summary(self) -> dict[str, Any]:
        """The figures."""
        times = sorted(self.seconds)
        peaks = [max(life) for life in self.memory if life]
        return {
            "outcomes": dict(self.outcomes),
            "answered_twice": self.answered_twice(),
            "problems": self.problems[:5],
            "p50_s": round(times[len(times) // 2], 3),
            "p99_s": round(times[int(len(times) * 0.99)], 3),
            "memory_peak_mib": round(max(peaks)),
            "memory_growth_mib": round(self.growth_mib(), 1),
        }

    def answered_twice(self) -> int:
        """Requests that the log has as answered more than once."""
        counts: Counter[str] = Counter()
        for line in self.log.read_text(errors="replace", encoding="utf-8").splitlines():
            if '"message": "request"' in line:
                entry = json.loads(line)
                counts[entry["request_id"]] += entry["status"] == 200
        if missing := sum(map(self._was_due_in_log, self.answered.keys() - counts.keys())):
            self.problems.append(f"{missing} answers are in no log")
        return sum(count > 1 for count in counts.values())

    def _was_due_in_log(self, request_id: str) -> bool:
        """Whether its line must be there: one follows its answer, and a kill may come between the two."""
        return all(abs(moment - self.answered[request_id]) > LOG_DELAY_S for moment in self.kills)


def agree(answer: Any, expected: Any) -> bool:
    """Whether two answers are the same, scores up to rounding."""
    if isinstance(expected, float):
        return abs(answer - expected) <= SCORE_TOLERANCE
    return answer == expected


async def put(service: Service, client: httpx.AsyncClient, rng: random.Random) -> None:
    """One request of one client."""
    number = rng.randrange(len(service.bodies))
    request_id = uuid.uuid4().hex
    patience_s = rng.uniform(0, 0.5) if rng.random() < LEAVES else ANSWER_TIMEOUT_S
    began = time.monotonic()
    try:
        async with asyncio.timeout(patience_s):
            response = await client.post(
                service.url + service.route, json=service.bodies[number], headers={"X-Request-Id": request_id}
            )
    except TimeoutError:
        service.outcomes["left" if patience_s < ANSWER_TIMEOUT_S else "hung"] += 1
        return
    except httpx.TransportError as error:
        killed = service.was_killed_since(began)
        service.outcomes["connection lost in a kill" if killed else "connection lost"] += 1
        if not killed:
            service.problems.append(repr(error))
        await asyncio.sleep(rng.uniform(0.5, 1.5))
        return
    if response.headers.get("X-Request-Id") != request_id:
        service.problems.append("an answer came with another request's id")
    if response.is_success:
        right = agree(result_of(response), service.expected[number])
        service.outcomes["right" if right else "wrong"] += 1
        service.seconds.append(time.monotonic() - began)
        service.answered[request_id] = time.monotonic()
        return
    clear = response.status_code in BUSY and isinstance(response.json().get("detail"), str)
    service.outcomes[f"{response.status_code}"] += 1
    if not clear or (response.status_code == 503 and not service.was_killed_since(began)):
        service.problems.append(f"{response.status_code}: {response.text[:200]}")
    await asyncio.sleep(rng.uniform(0.5, 1.5))


def result_of(response: httpx.Response) -> Any:
    """What has to be the same every time."""
    answer = response.json()
    return answer["value"] if "value" in answer else answer["results"]


async def press(services: list[Service], seconds: float, clients: int, kills: int, seed: int) -> None:
    """Find the right answers, then run the clients and the kills."""
    unbounded = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(limits=unbounded, timeout=None) as client:
        await asyncio.gather(*(service.start() for service in services))
        for service in services:
            for body in service.bodies:
                answer = await client.post(service.url + service.route, json=body)
                if not answer.is_success:
                    raise UserError(f"the quiet {service.name} service does not answer: {answer.text}")
                service.expected.append(result_of(answer))
        over = asyncio.Event()

        async def repeat(service: Service, rng: random.Random) -> None:
            while not over.is_set():
                await put(service, client, rng)

        rngs = [random.Random(f"{seed}/{number}") for number in range(clients)]
        async with asyncio.TaskGroup() as tasks, memory_watched(services):
            for service in services:
                for rng in rngs:
                    tasks.create_task(repeat(service, rng))
            for _ in range(kills):
                await asyncio.sleep(seconds / (kills + 1))
                await asyncio.gather(*(service.kill_and_restart() for service in services))
            await asyncio.sleep(seconds / (kills + 1))
            over.set()


@asynccontextmanager
async def memory_watched(services: list[Service]) -> AsyncIterator[None]:
    """Note the services' memory all the while."""

    async def watch() -> None:
        while True:
            await asyncio.sleep(0.25)
            for service in services:
                if service.ready_at > service.killed_at:
                    service.watch_memory()

    watching = asyncio.create_task(watch())
    yield
    watching.cancel()


def services_of(model_path: Path, engine: str, folder: Path, max_pending: int) -> list[Service]:
    """Both services of a model, not started yet."""
    prompts = [PROMPT.format(f"question {number}") for number in range(8)]
    generate = [
        {"prefix_prompt": prompt, "max_tokens": 8 + number, "response_num": 1 + number % 4, "seed": number}
        for number, prompt in enumerate(prompts)
    ]
    texts = [f"{prompt}<think>\n{'step ' * number}.\n\nand.\n\n</think>\n\nso" for number, prompt in enumerate(prompts)]
    pending = ["--max_pending", str(max_pending), "--log_format", "json"]

    def script(name: str) -> list[str]:
        return [sys.executable, str(ROOT / "test" / name), "--model_path", str(model_path), *pending]

    policy = [*script("policy_model_queue.py"), "--engine", engine]
    return [
        Service("policy", policy, free_port(), folder / "policy.log", "/generate", generate),
        Service(
            "score", script("score_model_queue.py"), free_port(), folder / "score.log", "/score",
            [{"text": text} for text in texts],
        ),
    ]  # fmt: skip


def write_model(folder: Path) -> Path:
    """The tiny model with a random head."""
    write_tiny_model(folder)
    head = ScoreHead(read_config(folder).hidden_size)
    save_score_head(folder, head.state_dict(), SPRMConfig(StepRule.from_tokenizer(load_tokenizer(folder))))
    return folder


@exit_on_user_error
def main(
    seconds: Annotated[float, typer.Option("--seconds", help="Time under load, restarts not counted.")] = 120.0,
    clients: Annotated[int, typer.Option("--clients", min=1, help="Of each service.")] = 64,
    kills: Annotated[int, typer.Option("--kills", min=0, help="Of each service.")] = 4,
    engine: Annotated[str, typer.Option("--engine", help="Of the policy service: hf or vllm.")] = "hf",
    model_path: Annotated[Path | None, typer.Option("--model_path", help="By default the untrained tiny one.")] = None,
    max_pending: Annotated[int, typer.Option("--max_pending", min=1, help="Of the services, so that 429 comes.")] = 96,
    seed: Annotated[int, typer.Option("--seed", help="Of the clients' behaviour.")] = 0,
    out: Annotated[Path, typer.Option("--out", help="Where the figures go.")] = ROOT / "bench/results/load.json",
) -> None:
    """Load both services for a while and check every answer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        services = services_of(model_path or write_model(folder / "model"), engine, folder, max_pending)
        try:
            asyncio.run(press(services, seconds, clients, kills, seed))
        finally:
            for service in services:
                if service.process is not None and service.process.poll() is None:
                    service.process.terminate()
        statuses = {service.name: service.process.wait(90) for service in services}
        figures = {service.name: service.summary() for service in services}
    settings = {"seconds": seconds, "clients": clients, "kills": kills, "engine": engine, "exit_statuses": statuses}
    report({"settings": settings, **figures, "machine": describe_machine()}, out)
    failed = [
        service.outcomes["wrong"] or service.outcomes["hung"] or figure["problems"] or figure["answered_twice"]
        for service, figure in zip(services, figures.values(), strict=True)
    ]
    if any(failed) or any(statuses.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
