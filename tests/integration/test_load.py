"""`bench/load.py`, scaled down: clients that leave, services that are killed, and every answer checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).parents[2]


def test_every_request_is_answered_rightly_or_refused_clearly(tiny_model_dir: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, str(REPOSITORY / "bench/load.py"), "--model_path", str(tiny_model_dir)),
        *("--seconds", "10", "--clients", "64", "--kills", "1", "--out", str(tmp_path / "load.json")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    for service in ("policy", "score"):
        outcomes = figures[service]["outcomes"]
        assert outcomes["right"] > 50
        assert outcomes["left"] > 0
        assert outcomes["connection lost in a kill"] > 0
        assert not outcomes.keys() & {"wrong", "hung", "connection lost"}
        assert figures[service]["answered_twice"] == 0
        assert figures[service]["memory_growth_mib"] < 64
