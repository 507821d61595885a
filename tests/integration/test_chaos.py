"""The driver and its services, killed again and again: nothing lost, nothing twice."""

from __future__ import annotations

import json
import multiprocessing
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from xbai.benchmarks.tiny_model import make_tokenizer
from xbai.evaluate.client import RetryPolicy
from xbai.evaluate.options import RunOptions
from xbai.evaluate.results import read_result_lines
from xbai.evaluate.run import run

pytestmark = pytest.mark.slow

SERVICE = Path(__file__).parents[2] / "bench" / "simulated_service.py"
QUESTIONS, SAMPLES, BRANCH, AT_ONCE = 40, 12, 4, 3
KILLS = 20
MEAN_S = 0.5
SECONDS = 100.0


class Service:
    """A simulated service that can be killed and started again at its place."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        options = ["--port", str(self.port), "--slots", "4", "--mean_s", str(MEAN_S)]
        self.process = subprocess.Popen([sys.executable, str(SERVICE), *options])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def driver(options: RunOptions) -> BaseProcess:
    """The driver in a process of its own, forked from one that has done the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["xbai.evaluate.run", "transformers.models.auto.tokenization_auto"])
    process = context.Process(target=run, args=(options,))
    process.start()
    return process


def journalled(options: RunOptions) -> int:
    journal = Path(f"{options.output_file}.journal")
    return journal.read_bytes().count(b'"response"') if journal.exists() else 0


@pytest.fixture
def options(tmp_path: Path) -> RunOptions:
    questions = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"Make 10 from {n}", "answer": "1 2"} for n in range(QUESTIONS)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_tokenizer().save_pretrained(tmp_path / "model")
    return RunOptions(
        task="make10",
        input_file=str(questions),
        output_file=str(tmp_path / "results.jsonl"),
        model_dir=str(tmp_path / "model"),
        response_api_url="",
        n_samples=SAMPLES // BRANCH,
        branch=BRANCH,
        response_num=AT_ONCE,
        retry=RetryPolicy(patience_s=60.0),
    )


def test_twenty_kills_of_driver_and_services_lose_nothing_and_repeat_nothing(options: RunOptions) -> None:
    chance = random.Random(0)
    victims = ["driver"] * (KILLS // 2) + ["service"] * (KILLS - KILLS // 2)
    chance.shuffle(victims)
    policies, scorer = [Service(), Service()], Service()
    urls = ",".join(service.url for service in policies)
    options = replace(options, response_api_url=urls, score_api_url=scorer.url)
    services = [*policies, scorer]
    process = driver(options)
    kept = []
    deadline = time.monotonic() + SECONDS
    try:
        for victim in victims:
            before = journalled(options)
            while journalled(options) == before and process.is_alive():
                assert time.monotonic() < deadline, "the run does not go on"
                time.sleep(0.01)
            time.sleep(chance.uniform(0.0, 0.5))
            assert process.is_alive(), "the run ended before the last kill"
            if victim == "driver":
                process.kill()
                process.join()
                kept.append(journalled(options))
                process = driver(options)
            else:
                service = chance.choice(services)
                service.kill()
                service.start()
        process.join(deadline - time.monotonic())
        assert process.exitcode == 0
    finally:
        process.kill()
        for service in services:
            service.kill()

    assert kept == sorted(kept) and 0 < kept[0] < kept[-1] < QUESTIONS * SAMPLES
    lines = list(read_result_lines(Path(options.output_file)))
    found = Counter((line.index, sample) for line in lines for sample in line.sample_indices)
    assert found == Counter((question, sample) for question in range(QUESTIONS) for sample in range(SAMPLES))
    for line in lines:
        assert len(set(line.responses)) == SAMPLES
        assert None not in line.scores
    assert not Path(f"{options.output_file}.journal").exists()
