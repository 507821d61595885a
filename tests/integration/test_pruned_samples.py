"""Samples that are given up leave nothing behind: in a process of its own, without the type checks of tests, which keep
what they have seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.long
def test_ten_thousand_pruned_samples_leave_nothing_behind(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    command = [sys.executable, str(REPOSITORY / "bench/pruned_samples.py"), "--out", str(tmp_path / "out.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["pruned"], result["requests_left"], result["blocks_lost"]) == (10_000, 0, 0)
    assert result["growth_mib"] < 16
