"""Bodies made to freeze a service, many at once: `/health` answers meanwhile, and memory stays."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

BENCH = Path(__file__).parents[2] / "bench" / "hostile_bodies.py"


@pytest.mark.parametrize(("megabytes", "rounds"), [pytest.param(1, 31, id="1 MB"), pytest.param(15, 62, id="15 MB")])
def test_nobody_waits_for_hostile_bodies(
    start_service: Callable, tiny_model_dir: Path, megabytes: int, rounds: int
) -> None:
    model = ["--model_path", str(tiny_model_dir)]
    policy = start_service("policy_model_queue.py", *model, "--engine", "hf")
    score = start_service("score_model_queue.py", *model)
    before = {service: peak_memory_mib(service.wait_ready().process.pid) for service in (policy, score)}
    command = [
        *(sys.executable, str(BENCH), "--policy_url", policy.url, "--score_url", score.url),
        *("--rounds", str(rounds), "--at_once", "4", "--megabytes", str(megabytes)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    damage = json.loads(done.stdout.splitlines()[-1])
    assert damage["hostile_bodies"] == 4 * rounds
    assert (damage["lost"], damage["silently_wrong"], damage["hung"]) == (0, 0, 0), damage["complaints"]
    assert damage["longest_health_s"] < 1
    for service, memory in before.items():
        assert peak_memory_mib(service.process.pid) - memory < 1024
        assert service.stop() == 0


def peak_memory_mib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024
