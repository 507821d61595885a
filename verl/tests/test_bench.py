"""The benchmarks run at their smallest, and on a machine with torch and transformers alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"

# Stands for a machine where none of these is installed, nor this repository.
WITHOUT = """
import runpy, sys
from importlib.machinery import PathFinder
from pathlib import Path
missing = set(sys.argv[2].split(","))
find_spec = PathFinder.find_spec
def find(name, path=None, target=None):
    return None if name.split(".")[0] in missing else find_spec(name, path, target)
PathFinder.find_spec = staticmethod(find)
root = Path(sys.argv[1]).parents[1]
sys.path = [entry for entry in sys.path if Path(entry) not in (root, root / "verl")]
sys.argv = sys.argv[1:2] + sys.argv[3:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NOT_NEEDED = (
    "ray,hydra,omegaconf,tensordict,vllm,datasets,pyarrow,torchdata,pebble,fastapi,wandb,torchao,accelerate,"
    "jaxtyping,beartype"
)


def _run(command: list[object], tmp_path: Path) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, *map(str, command), "--out", str(tmp_path / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    last_line = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == last_line
    assert last_line["machine"]["cores"] >= 1
    return last_line


@pytest.mark.slow
def test_train_step_needs_torch_and_transformers_only(tmp_path: Path):
    sizes = {"models": "tiny", "prompts": 2, "samples": 2, "prompt-tokens": 8, "response-tokens": 16, "repeats": 1}
    options = [text for name, value in sizes.items() for text in (f"--{name}", value)]
    result = _run(["-c", WITHOUT, BENCH / "train_step.py", NOT_NEEDED, *options, "--warm-ups", 0], tmp_path)
    figures = result["tiny"]
    assert figures["engines"].keys() == {"hf"}
    for layout in ("padded", "packed"):
        for phase in ("log_prob", "update"):
            assert figures[layout][phase]["tokens_per_s"] > 0
    assert figures["padded"]["update"]["tokens"] == figures["packed"]["update"]["tokens"] <= 4 * 24
    assert figures["engines"]["hf"]["rollout"]["tokens"] == 4 * 16
    assert figures["engines"]["hf"]["weight_sync"]["gib"] > 0


@pytest.mark.parametrize("entropy", ["--entropy", "--no-entropy"])
@pytest.mark.long
def test_log_prob_memory_compares_both_ways(tmp_path: Path, entropy: str):
    sizes = {"tokens": 512, "vocabulary": 20000, "hidden": 16, "logits-per-chunk": 500_000, "repeats": 1}
    options = [text for name, value in sizes.items() for text in (f"--{name}", value)]
    result = _run([BENCH / "log_prob_memory.py", *options, entropy], tmp_path)
    assert result["plain"]["peak_gib"] > 3 * result["chunked"]["peak_gib"]
    assert max(result["max_relative_difference"].values()) < 1e-5
    assert ("entropy" in result["max_relative_difference"]) == (entropy == "--entropy")


def test_log_prob_memory_refuses_what_cannot_fit(tmp_path: Path):
    command = [sys.executable, BENCH / "log_prob_memory.py", "--tokens", str(10**9)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --tokens 1000000000: the plain way needs about ")


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a benchmark needs of a finished one, its base untrained."""
    folder = tmp_path_factory.mktemp("quickstart")
    for name, out in (("make10", "data"), ("tiny_model", "base")):
        subprocess.run([sys.executable, "-m", f"xbai.benchmarks.{name}", "--out", folder / out], check=True)
    return folder


@pytest.mark.long
def test_train_step_measures_what_a_run_spends_beside_its_phases(quickstart: Path, tmp_path: Path):
    sizes = {"models": "tiny", "engines": "hf", "prompts": 2, "samples": 2, "prompt-tokens": 8, "response-tokens": 16}
    options = [text for name, value in sizes.items() for text in (f"--{name}", value)]
    result = _run([BENCH / "train_step.py", *options, "--repeats", 2, "--quickstart", quickstart], tmp_path)
    assert result["run"]["seconds"] > 0
    assert 0 < result["run"]["outside_share"] < 0.1


@pytest.mark.long
def test_the_trainer_is_compared_with_trl(quickstart: Path, tmp_path: Path):
    options = ["--steps", 2, "--turns", 1, "--engines", "generate"]
    result = _run([BENCH / "against_trl.py", quickstart, *options], tmp_path)
    assert result["trl_over_ours"] == pytest.approx(result["trl_seconds"] / result["ours_seconds"], rel=0.01)
    for arm in result["arms"].values():
        assert len(arm["rewards"]) == 2 and arm["tokens"] > 0


@pytest.mark.long
def test_modes_of_sampling_are_compared(quickstart: Path, tmp_path: Path):
    result = _run(
        [BENCH / "rollout_modes.py", quickstart, "--steps", 2, "--turns", 1, "--response-tokens", 16], tmp_path
    )
    for name, arm in result["arms"].items():
        assert arm["seconds"] > 0 and arm["tokens"] > 0
        assert (arm["phases"]["rollout_wait"] > 0) == (name in ("one_step_off", "both"))
    assert result["partial_over_sync"] == pytest.approx(
        result["arms"]["sync"]["tokens_per_s"] / result["arms"]["partial"]["tokens_per_s"], rel=0.01
    )
