"""Every program that reads a model's folder says in one line what is wrong with it, before the work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = {
    "score": ["test/score_model_queue.py", "--ip", "127.0.0.1", "--port", "0", "--model_path"],
    "policy": ["test/policy_model_queue.py", "--engine", "hf", "--ip", "127.0.0.1", "--port", "0", "--model_path"],
    "features": [
        "-c",
        "from xbai.cli import app; app()",
        "features",
        "rows.jsonl",
        "--output",
        "features",
        "--model_path",
    ],
    "ppo": [
        *("-m", "verl.trainer.main_ppo", "trainer.device=cpu", "trainer.n_gpus_per_node=1", "data.train_batch_size=1"),
        *("actor_rollout_ref.rollout.name=hf", "actor_rollout_ref.actor.ppo_mini_batch_size=1"),
        *("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1", "data.train_files=rows.parquet"),
        *("data.max_prompt_length=64", "data.max_response_length=24", "data.val_files=null"),
        *("trainer.default_local_dir=run", "actor_rollout_ref.model.path="),
    ],
    "sft": [
        *("-m", "verl.trainer.main_sft", "data.train_files=rows.parquet", "data.train_batch_size=1"),
        *("trainer.output_dir=out", "model.path="),
    ],
    "head": ["-m", "verl.trainer.main_score", "data.train_files=rows.jsonl", "trainer.output_dir=out", "model.path="],
}


def cut_weights(folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    return "model.safetensors: cut off, or no safetensors file"


def a_list_as_configuration(folder: Path) -> str:
    (folder / "config.json").write_text("[]", encoding="utf-8")
    return "config.json: expected a JSON object"


def cut_tokenizer(folder: Path) -> str:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:5000])
    return "tokenizer.json: not valid JSON"


def head_that_is_not_finite(folder: Path) -> str:
    weights = torch.load(folder / "score_module.pt")
    weights["3.weight"][0, 5] = torch.nan
    torch.save(weights, folder / "score_module.pt")
    return "score_module.pt: 3.weight holds weights that are not finite"


def run(program: str, folder: Path, cwd: Path) -> subprocess.CompletedProcess:
    """Start it on a model, where `rows.jsonl` and `rows.parquet` are rows for all of them."""
    row = {
        "data_source": "make10",
        "prompt": [{"role": "user", "content": "Make 10 from 7 3"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "7 3"},
        "extra_info": {"index": 0},
        "response": "Seven.\n\nThree.\n\nTen.",
        "correct": True,
    }
    pd.DataFrame([row]).to_parquet(cwd / "rows.parquet")
    graded = [{"prompt": "p", "response": row["response"], "correct": correct} for correct in (0, 1)]
    (cwd / "rows.jsonl").write_text("".join(json.dumps(response) + "\n" for response in graded), encoding="utf-8")
    *arguments, last = PROGRAMS[program]
    last = [f"{last}{folder}"] if last.endswith("=") else [last, str(folder)]
    arguments = [str(REPOSITORY / name) if name.startswith("test/") else name for name in arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *arguments, *last]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


FEW = [("score", cut_weights), ("ppo", head_that_is_not_finite)]
MANY = [
    *(("policy", spoil) for spoil in (cut_weights, a_list_as_configuration, cut_tokenizer, head_that_is_not_finite)),
    *(("score", spoil) for spoil in (a_list_as_configuration, cut_tokenizer, head_that_is_not_finite)),
    *(("ppo", spoil) for spoil in (cut_weights, a_list_as_configuration, cut_tokenizer)),
    *(("sft", spoil) for spoil in (cut_weights, a_list_as_configuration, cut_tokenizer, head_that_is_not_finite)),
    *((program, spoil) for program in ("features", "head") for spoil in (cut_weights, cut_tokenizer)),
]


@pytest.mark.parametrize(
    ("program", "spoil"),
    [
        *(pytest.param(*case, marks=pytest.mark.slow) for case in FEW),
        *(pytest.param(*c, marks=pytest.mark.long) for c in MANY),
    ],
)
def test_one_line_names_the_file(
    program: str, spoil: Callable[[Path], str], tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    message = spoil(folder)
    done = run(program, folder, tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert f"{folder}/{message}" in line
    assert not (tmp_path / "out").exists()
