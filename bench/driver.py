"""How near the evaluation driver comes to keeping every slot of its services busy, while one of them dies.

    python bench/driver.py [--services 2,4] [--seconds 130] [--out FILE]

Simulated policy services (`simulated_service.py`: real HTTP servers in processes of their own, latencies log-normal
with mean 2 s, 8 slots each, 429 when full), one response a request, 32 responses a question. One service is killed
half way, at the time T = work / slots / 2. The ideal is what perfect packing would take of slots that never wait and
never lose work: T + (work - T x slots) / (slots - 8), `work` being the sum of the latencies of all requests, each once.
The wall time is that of the driver's `run`, from reading the questions to the finished file, with nothing told to it
of slots, latencies or the death.

Beside it, on services of their own and without a death: one question at a time, all its requests at once and a barrier
before the next, as public evaluation code does, though with this driver's client, over work / slots.

`lost` counts samples that are not in the result file, `duplicated` those that are there twice or were answered twice.
The last line is one JSON object: `wall_over_ideal` is the worst case's, `sequential_over_ideal` the best's.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from machine import ROOT, describe_machine, report
from simulated_service import latency_s

from xbai.benchmarks.registry import get_benchmark
from xbai.benchmarks.tiny_model import make_tokenizer
from xbai.client.pool import ServicePool, open_client
from xbai.client.replicas import RetryPolicy
from xbai.infer.options import RunOptions
from xbai.infer.run import run
from xbai.model_folder import load_tokenizer
from xbai.prompts import prompt_text
from xbai.results.lines import read_result_lines
from xbai.results.settings import request_seed

SLOTS, MEAN_S = 8, 2.0
SAMPLES = 32
SEED = 0
READY_TIMEOUT_S = 120.0
SEQUENTIAL_QUESTIONS = 12
"""Enough for the ratio; all of them would take several times as long."""


class Workload:
    """Questions in a folder, and what each of their requests will take."""

    def __init__(self, folder: Path, questions: int) -> None:
        self.input_file = folder / "questions.jsonl"
        self.input_file.write_text(
            "".join(
                json.dumps({"problem": f"What is {n} + {n}?", "answer": str(2 * n)}) + "\n" for n in range(questions)
            ),
            encoding="utf-8",
        )
        self.model_dir = folder / "model"
        make_tokenizer().save_pretrained(self.model_dir)
        tokenizer = load_tokenizer(self.model_dir)
        benchmark = get_benchmark("aime24")
        self.prompts = [prompt_text(tokenizer, benchmark.messages(q), q.place) for q in benchmark.read(self.input_file)]

    def seconds(self, question: int, sample: int) -> float:
        """How long this response takes."""
        return latency_s(self.prompts[question], request_seed(SEED, question, sample), MEAN_S)

    def total_s(self) -> float:
        """How long one slot would take for everything."""
        return sum(self.seconds(question, sample) for question in range(len(self.prompts)) for sample in range(SAMPLES))


def questions_for(ideal_s: float, services: int, dies: bool) -> int:
    """How many questions keep the services busy for about so long."""
    slots = SLOTS * services
    share = 0.5 / slots + 0.5 / (slots - SLOTS) if dies else 1 / slots
    return max(1, round(ideal_s / share / MEAN_S / SAMPLES))


@contextmanager
def simulated_services(count: int, folder: Path) -> Iterator[tuple[list[str], list[subprocess.Popen], list[Path]]]:
    """URLs, processes, and the files in which they note their answers."""
    records = [folder / f"answers_{number}" for number in range(count)]
    urls, processes = [], []
    try:
        for record in records:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                port = listener.getsockname()[1]
            command = [sys.executable, str(ROOT / "bench" / "simulated_service.py"), "--port", str(port)]
            command += ["--slots", str(SLOTS), "--mean_s", str(MEAN_S), "--record", str(record)]
            processes.append(subprocess.Popen(command))
            urls.append(f"http://127.0.0.1:{port}")
        for url, process in zip(urls, processes):
            _wait_ready(url, process)
        yield urls, processes, records
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _wait_ready(url: str, process: subprocess.Popen) -> None:
    while True:
        try:
            httpx.get(f"{url}/ready")
            return
        except httpx.TransportError:
            if process.poll() is not None:
                raise
            time.sleep(0.1)


def share_barrier(barrier: Barrier) -> None:
    """Cases begin together: what one of them still imports would slow the others."""
    global all_ready
    all_ready = barrier


def drive(services: int, ideal_s: float) -> dict[str, Any]:
    """The driver, while a service dies half way."""
    slots = SLOTS * services
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = Workload(folder, questions_for(ideal_s, services, dies=True))
        death_s = work.total_s() / slots / 2
        ideal = death_s + (work.total_s() - death_s * slots) / (slots - SLOTS)
        with simulated_services(services, folder) as (urls, processes, records):
            options = RunOptions(
                task="aime24",
                input_file=str(work.input_file),
                output_file=str(folder / "results.jsonl"),
                model_dir=str(work.model_dir),
                response_api_url=",".join(urls),
                n_samples=SAMPLES,
                response_num=1,
                score_source="none",
                seed=SEED,
            )
            all_ready.wait(timeout=READY_TIMEOUT_S)
            death = threading.Timer(death_s, processes[0].kill)
            death.start()
            started = time.monotonic()
            path = run(options)
            wall = time.monotonic() - started
            died = not death.is_alive()
        found = Counter(sample.key for line in read_result_lines(path) for sample in line.samples)
        answers = Counter(line for record in records for line in record.read_text(encoding="utf-8").splitlines())
        wanted = len(work.prompts) * SAMPLES
        return {
            "services": services,
            "died": died,
            "requests": wanted,
            "ideal_s": ideal,
            "wall_s": wall,
            "wall_over_ideal": wall / ideal,
            "lost": wanted - len(found),
            "duplicated": found.total() - len(found) + answers.total() - len(answers),
        }


def drive_sequentially(services: int) -> dict[str, Any]:
    """One question at a time, with a barrier after each."""
    with tempfile.TemporaryDirectory() as name:
        work = Workload(Path(name), SEQUENTIAL_QUESTIONS)
        ideal = work.total_s() / (SLOTS * services)
        with simulated_services(services, Path(name)) as (urls, _, _):
            all_ready.wait(timeout=READY_TIMEOUT_S)
            started = time.monotonic()
            asyncio.run(_question_by_question(work, ",".join(urls)))
            wall = time.monotonic() - started
    return {"sequential_ideal_s": ideal, "sequential_wall_s": wall, "sequential_over_ideal": wall / ideal}


async def _question_by_question(work: Workload, urls: str) -> None:
    async with open_client() as client:
        pool = ServicePool(urls, "/generate", client, RetryPolicy(), max_in_flight=SLOTS)
        for question, prompt in enumerate(work.prompts):
            seeds = [request_seed(SEED, question, sample) for sample in range(SAMPLES)]
            bodies = [{"prefix_prompt": prompt, "response_num": 1, "seed": seed} for seed in seeds]
            await asyncio.gather(*(pool.post(body, json.loads) for body in bodies))


def main(
    services: Annotated[str, typer.Option("--services", help="How many, for each case; comma-separated.")] = "2,4",
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="About the ideal time of each case.")] = 130.0,
    out: Annotated[Path, typer.Option("--out")] = ROOT / "bench" / "results" / "driver.json",
) -> None:
    """Measure all cases at the same time: they need next to no processor."""
    counts = [int(count) for count in services.split(",")]
    context, at_once = get_context("spawn"), 2 * len(counts)
    with ProcessPoolExecutor(at_once, context, share_barrier, (context.Barrier(at_once),)) as processes:
        driven = [processes.submit(drive, count, seconds) for count in counts]
        sequential = [processes.submit(drive_sequentially, count) for count in counts]
        cases = [first.result() | second.result() for first, second in zip(driven, sequential)]
    for case in cases:
        sys.stdout.write(
            f"{case['services']} services, one dies: {case['requests']} requests, ideal {case['ideal_s']:.1f} s, "
            f"driver {case['wall_s']:.1f} s = {case['wall_over_ideal']:.3f} of it; "
            f"question by question, none dies: {case['sequential_over_ideal']:.2f}\n"
        )
    result = {
        "wall_over_ideal": max(case["wall_over_ideal"] for case in cases),
        "sequential_over_ideal": min(case["sequential_over_ideal"] for case in cases),
        "lost": sum(case["lost"] for case in cases),
        "duplicated": sum(case["duplicated"] for case in cases),
        "cases": cases,
        "machine": describe_machine(),
    }
    report(result, out)


if __name__ == "__main__":
    typer.run(main)
