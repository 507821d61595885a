"""The inference driver and its services, killed again and again: what is lost, what comes twice, what is wrong.

    python bench/driver_kills.py [--kills 32] [--seed 0]

Simulated services answer 40 questions with 12 samples each; at moments that the seed decides, the driver or a service
is killed (SIGKILL) and started again. The last line is one JSON object:

    driver_kills, service_kills    how many
    lost                           samples that were journalled before a kill and not after it, or lack in the results
    silently_wrong                 samples that are in the results twice, repeat another one, or lack their score
    hung                           whether the run did not go on, or did not end well
"""

from __future__ import annotations

import json
import multiprocessing
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated

import typer

from xbai.benchmarks.tiny_model import make_tokenizer
from xbai.client.replicas import RetryPolicy
from xbai.infer.options import RunOptions
from xbai.infer.run import run
from xbai.results.lines import read_result_lines

SERVICE = Path(__file__).with_name("simulated_service.py")
QUESTIONS, SAMPLES, BRANCH, AT_ONCE = 40, 12, 4, 3
MEAN_S = 0.5
SECONDS_A_KILL, SECONDS_TO_END = 10.0, 60.0


class Service:
    """A simulated service that can be killed and started again at its place."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Serve, from a new process."""
        options = ["--port", str(self.port), "--slots", "4", "--mean_s", str(MEAN_S)]
        self.process = subprocess.Popen([sys.executable, str(SERVICE), *options])

    def kill(self) -> None:
        """Without a chance to say anything."""
        self.process.kill()
        self.process.wait()


class KilledRun:
    """A run that goes on after every kill.

    Args:
        folder: an empty one.
        chance: chooses victims and moments.
    """

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self._chance = chance
        self._services = [Service(), Service(), Service()]
        *policies, scorer = (service.url for service in self._services)
        self._options = replace(_options(folder), response_api_url=",".join(policies), score_api_url=scorer)
        self._process = self._driver()
        self.kept_by_kill: list[int] = []

    def kill(self, victim: str) -> bool:
        """Kill the `driver` or a `service` after the next sample; whether the run got that far in time."""
        deadline, before = time.monotonic() + SECONDS_A_KILL, self._journalled()
        while self._journalled() == before:
            if time.monotonic() > deadline or not self._process.is_alive():
                return False
            time.sleep(0.01)
        time.sleep(self._chance.uniform(0.0, MEAN_S))
        if victim == "driver":
            self._process.kill()
            self._process.join()
            self.kept_by_kill.append(self._journalled())
            self._process = self._driver()
        else:
            service = self._chance.choice(self._services)
            service.kill()
            service.start()
        return True

    def ends_well(self) -> bool:
        """Wait for the end."""
        self._process.join(SECONDS_TO_END)
        return self._process.exitcode == 0 and not self._journal.exists()

    def outcome(self) -> dict[str, int]:
        """`lost` and `silently_wrong` of the results that are there."""
        lines = list(read_result_lines(Path(self._options.output_file)))
        found = Counter(sample.key for line in lines for sample in line.samples)
        wanted = {(question, sample) for question in range(QUESTIONS) for sample in range(SAMPLES)}
        forgotten = sum(max(0, before - after) for before, after in zip(self.kept_by_kill, self.kept_by_kill[1:]))
        repeated = sum(len(line.responses) - len(set(line.responses)) for line in lines)
        unscored = sum(sample.score is None for line in lines for sample in line.samples)
        return {
            "lost": len(wanted - found.keys()) + forgotten,
            "silently_wrong": (found - Counter(wanted)).total() + repeated + unscored,
        }

    def close(self) -> None:
        """End all processes."""
        self._process.kill()
        for service in self._services:
            service.kill()

    @property
    def _journal(self) -> Path:
        return Path(f"{self._options.output_file}.journal")

    def _journalled(self) -> int:
        return self._journal.read_bytes().count(b'"response"') if self._journal.exists() else 0

    def _driver(self) -> BaseProcess:
        """In a process of its own, forked from one that has done the imports."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["xbai.infer.run", "transformers.models.auto.tokenization_auto"])
        process = context.Process(target=run, args=(self._options,))
        process.start()
        return process


def _options(folder: Path) -> RunOptions:
    questions = folder / "questions.jsonl"
    rows = [{"prompt": f"Make 10 from {n}", "answer": "1 2"} for n in range(QUESTIONS)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    make_tokenizer().save_pretrained(folder / "model")
    return RunOptions(
        task="make10",
        input_file=str(questions),
        output_file=str(folder / "results.jsonl"),
        model_dir=str(folder / "model"),
        response_api_url="",
        n_samples=SAMPLES // BRANCH,
        branch=BRANCH,
        response_num=AT_ONCE,
        retry=RetryPolicy(patience_s=60.0),
    )


def kill_driver_and_services(folder: Path, kills: int, seed: int = 0) -> dict[str, int]:
    """Kill so many times, half of them the driver, in an empty folder; see the module for what is returned."""
    chance = random.Random(seed)
    victims = ["driver"] * (kills // 2) + ["service"] * (kills - kills // 2)
    chance.shuffle(victims)
    killed, run_of_kills = Counter[str](), KilledRun(folder, chance)
    try:
        for victim in victims:
            if not run_of_kills.kill(victim):
                break
            killed[victim] += 1
        hung = int(killed.total() < kills or not run_of_kills.ends_well())
        outcome = {"lost": 0, "silently_wrong": 0} if hung else run_of_kills.outcome()
    finally:
        run_of_kills.close()
    return {"driver_kills": killed["driver"], "service_kills": killed["service"], **outcome, "hung": hung}


def main(
    kills: Annotated[int, typer.Option(min=2, help="of the driver and of services together")] = 32,
    seed: Annotated[int, typer.Option(help="of victims and moments")] = 0,
) -> None:
    """Kill the driver and its services."""
    with tempfile.TemporaryDirectory() as folder:
        typer.echo(json.dumps(kill_driver_and_services(Path(folder), kills, seed)))


if __name__ == "__main__":
    typer.run(main)
