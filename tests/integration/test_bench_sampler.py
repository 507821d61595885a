"""The sampler's benchmark at its smallest, and that the host's work does not grow with the answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.long

BENCH = Path(__file__).parents[2] / "bench"


def test_penalties_cost_the_engines_sampler_no_copies_of_the_answers(tmp_path: Path) -> None:
    sizes = {"rows": 64, "tokens": 4096, "vocabulary": 600, "repeats": 5, "out": tmp_path / "sampler.json"}
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, BENCH / "sampler.py", *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(sizes["out"].read_text(encoding="utf-8")) == result
    assert result["both_over_plain"].keys() == {"top_p", "all", "cpu", "host"}
    found = result["settings"]["host"]
    assert found["vllm"]["both_ms"] > 4 * found["engine"]["both_ms"]
