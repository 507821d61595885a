"""What a killed run leaves behind ends with the next run of its folder; others' is named, all else is left alone."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from verl.single_controller.orphans import end_orphans, own_session

RUN = """
import sys, time
import ray
from omegaconf import OmegaConf
from verl.trainer.ppo.cluster import start_ray

start_ray(OmegaConf.create({
    "trainer": {"nnodes": 1, "device": "cpu", "n_gpus_per_node": 1, "default_local_dir": sys.argv[1]},
    "ray_init": {"num_cpus": 1},
}))
ray.get(ray.remote(lambda: None).remote())
sys.stdout.write("started\\n")
sys.stdout.flush()
time.sleep(300)
"""


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """`begin(session, title)`: a process of this title that waits, with a log in this session."""
    processes = []

    def begin(session: str, title: str = "ray::IDLE") -> subprocess.Popen:
        logs = tmp_path / session / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / "worker.out").open("a", encoding="utf-8") as log:
            processes.append(subprocess.Popen([title, "300"], executable="/bin/sleep", stdout=log))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def test_what_a_killed_run_of_the_folder_left_ends_and_others_are_named(begin, tmp_path: Path, caplog):
    own, other, unknown = begin("session_1"), begin("session_2"), begin("session_3")
    not_of_ray, of_no_session = begin("session_1", "python"), begin("logs")
    own_session(tmp_path / "session_1", tmp_path)
    own_session(tmp_path / "session_2", tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING):
        end_orphans(tmp_path)
    assert not psutil.pid_exists(own.pid)
    assert all(process.poll() is None for process in (other, unknown, not_of_ray, of_no_session))
    ended, left = caplog.messages
    assert ended == f"ending what a killed run of {tmp_path} has left behind: ray::IDLE (process {own.pid})"
    assert all(f"ray::IDLE (process {process.pid})" in left for process in (other, unknown)) and "kill -9" in left
    assert not any(f"process {process.pid})" in left for process in (not_of_ray, of_no_session))


def test_a_session_that_runs_keeps_its_processes(begin, tmp_path: Path, caplog):
    kept = begin("session_1")
    own_session(tmp_path / "session_1", tmp_path)
    raylet = begin("logs", f"/opt/ray/raylet --raylet_socket_name={tmp_path}/session_1/sockets/raylet")
    end_orphans(tmp_path)
    assert kept.poll() is None and f"process {kept.pid})" not in caplog.text
    raylet.kill()
    raylet.wait()
    end_orphans(tmp_path)
    assert not psutil.pid_exists(kept.pid)


def test_many_are_counted(begin, tmp_path: Path, caplog):
    for _ in range(11):
        begin("session_1")
    own_session(tmp_path / "session_1", tmp_path)
    end_orphans(tmp_path)
    assert caplog.messages[0].count("(process ") == 8 and caplog.messages[0].endswith(" and 3 more")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen]]:
    """`run()`: a driver that has started Ray for the folder `tmp_path`, in a process group with what it started."""
    runs = []

    def start() -> subprocess.Popen:
        with (tmp_path / "log.txt").open("a", encoding="utf-8") as log:
            command = [sys.executable, "-c", RUN, tmp_path]
            run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        runs.append(run)
        assert run.stdout.readline() == "started\n", (tmp_path / "log.txt").read_text(encoding="utf-8")
        return run

    yield start
    for started in runs:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.communicate(timeout=60)
    end_orphans(tmp_path)


@pytest.mark.long
def test_the_agents_of_a_killed_run_end_when_the_next_one_starts(run):
    """Ray's agents otherwise stay for a minute or more."""
    killed = run()
    session = psutil.Process(killed.pid).children(recursive=True)
    killed.kill()
    raylets = [process for process in session if process.name() == "raylet"]
    assert len(raylets) == 1 and not psutil.wait_procs(raylets, timeout=60)[1]
    assert any(process.is_running() for process in session)
    run()
    assert not psutil.wait_procs(session, timeout=60)[1]
