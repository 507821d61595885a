"""The serving benchmark at its smallest: real engines and services, all figures there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.long
def test_the_serving_benchmark_compares_what_gives_the_same_scores(tmp_path: Path) -> None:
    sizes = {
        "model": "tiny",
        "engine": "hf",
        "clients": "1,3",
        "prompts": 2,
        "response-tokens": 32,
        "repeats": 2,
        "text-tokens": "32-64",
        "texts": 4,
        "rounds": 2,
        "requests": 4,
    }
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    out = tmp_path / "results" / "serving.json"
    out.parent.mkdir()
    done = subprocess.run(
        [sys.executable, str(BENCH / "serving.py"), *options, "--out", str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert str(out) in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(out.read_text(encoding="utf-8")) == result
    assert result["fused_over_plain"] > 0
    assert result["second_pass_over_plain"] > 0
    assert result["score_service_over_reference"].keys() == {"1", "3"}
    figures = result["models"]["tiny"]
    assert figures["generate"]["fused_over_plain"]["low"] <= result["fused_over_plain"]
    assert figures["generate"]["fused_log_probs_over_fused"]["ratio"] > 0
    assert figures["score_service"]["largest_score_difference"] < 1e-4
    assert figures["score_service"]["clients"]["3"]["texts"] == 6
    for clients, load in figures["policy_service"]["clients"].items():
        assert load["requests"] >= max(4, 2 * int(clients))
        assert 0 < load["p50_s"] <= load["p99_s"]
    assert figures["policy_service"]["peak_memory_mib"]["resident"] > 100
