"""The programs of `examples/` do what they say, on a tiny model of random weights."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from verl.utils.tracking import METRICS_FILE
from xbai.model_folder import load_tokenizer
from xbai.prompts import prompt_text

EXAMPLES = Path(__file__).parents[2] / "examples"

Run = Callable[..., list[str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    """`run(name, *arguments) -> lines`: what an example prints."""

    def run(name: str, *arguments: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "400")
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_every_example_says_how_to_run_it_on_a_real_model():
    for path in EXAMPLES.glob("*.py"):
        assert re.search(rf"^    python examples/{path.name} models/", path.read_text(encoding="utf-8"), re.M)


def test_a_text_is_scored_step_by_step(run: Run, tiny_model_dir: Path, tmp_path: Path):
    prompt = prompt_text(load_tokenizer(tiny_model_dir), [{"role": "user", "content": "How many?\n\nFew.\n\n"}])
    text = tmp_path / "text.txt"
    text.write_text(prompt + "<think>Two and two [sic] are four.\n\nOne more.\n\n</think>Five.\n\n", encoding="utf-8")
    *steps, whole = run("score_text.py", tiny_model_dir, "--text_file", text)
    assert [step.split("  ")[1] for step in steps] == ["<think>Two and two [sic] are four.", "One more."]
    scores = [float(step.split()[0]) for step in steps]
    assert math.sqrt(math.prod(scores)) == pytest.approx(float(whole.split()[0]), abs=2e-3)
    assert whole.endswith("the response, 2 steps")


def test_the_best_of_n_is_the_one_with_the_highest_score(run: Run, tiny_model_dir: Path):
    options = ["Make 10 from 1 2 3 4", "--n", 6, "--max_tokens", 200, "--temperature", 1.5, "--seed", 1]
    lines = run("best_of_n.py", tiny_model_dir, *options, "--engine", "hf")
    rows = [line.split() for line in lines[:6]]
    scores = [float(row[1]) for row in rows]
    assert [row[0] for row in rows if row[-1] == "best"] == [str(scores.index(max(scores)))]
    assert len(set(scores)) > 1
    assert lines == run("best_of_n.py", tiny_model_dir, *options, "--engine", "hf")


def test_a_model_without_a_head_is_refused_in_one_line(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        run("score_text.py", tmp_path)
    assert re.fullmatch(r"error: .*config\.json: no such file.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("response", "letter", "score"),
    [
        ("A river runs down.", "e", 0),
        ("Always a brook runs down.", "e", 1),
        ("Brooks.", "e", 0),
        ("TEN TENTS STAND", "e", 0),
    ],
)
def test_the_reward_is_for_sentences_without_the_letter(response: str, letter: str, score: float):
    compute_score = runpy.run_path(str(EXAMPLES / "custom_reward.py"))["compute_score"]
    assert compute_score("lipograms", response, letter, {})["score"] == score


@pytest.mark.long
def test_a_run_with_the_custom_reward(tiny_model_dir: Path, tmp_path: Path):
    quick = [
        *("trainer.device=cpu", "actor_rollout_ref.rollout.name=hf", "actor_rollout_ref.rollout.dtype=float32"),
        *("data.max_response_length=24", "reward_model.num_workers=1"),
    ]
    command = [sys.executable, EXAMPLES / "custom_reward.py", tiny_model_dir, *quick]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "outputs/custom_reward"
    rows = [json.loads(line) for line in (out / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert 0 < row["reward/mean"] < 1 and row["reward/ungraded"] == 0
        assert row["reward_extra/letters"] > 0 and row["reward_extra/forbidden"] > 0
    assert (out / "global_step_2/actor").is_dir()
