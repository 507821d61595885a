"""Seconds of a GRPO step, here and in TRL: the same base, prompts, rewards and settings, 32 prompts x 8 samples.

    python bench/against_trl.py [outputs/quickstart] [--engines generate,vllm] [--steps 8] [--out FILE]

The base and the training problems are those of a finished quickstart. The arms take turns, each time a run of its own
on one process with all cores of the machine: TRL with the engine that is fastest for it here, this trainer (vLLM, Ray),
and this trainer without the score head. What a run costs before its first step is not counted, nor is that step, in
which what is compiled or cached for later is. Rewards of equal steps stand beside the seconds: both are to learn alike.

TRL comes from PyPI into a folder of its own (`outputs/trl`), at the version of `TRL`, beside the installed
transformers, torch and vLLM. The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from machine import ROOT, describe_machine, report, rounded
from short_run import ShortRun, run_until_done, steps_of_a_turn
from tqdm import tqdm
from turns import in_turns

from xbai.errors import UserError, exit_on_user_error

TRL = "trl==1.16.0"
TRL_FOLDER = ROOT / "outputs/trl"
ENGINES = ("generate", "vllm", "continuous")
MICRO_BATCH = 32
STEPS_TO_CHOOSE_BY = 2


@dataclass(frozen=True)
class Step:
    """One of a run: its seconds, tokens of its responses, and their mean reward."""

    seconds: float
    tokens: float
    reward: float


def steps_here(task: ShortRun, seed: int, *overrides: str) -> list[Step]:
    """Of a run of this trainer."""
    responses = task.prompts * task.samples
    return [
        Step(row["timing_s/step"], row["response_length/mean"] * responses, row["reward/mean"])
        for row in task.run(seed, *overrides)
    ]


def steps_of_trl(task: ShortRun, engine: str, seed: int) -> list[Step]:
    """Of a run of TRL."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "steps.json"
        options = {
            "model": str(task.base),
            "problems": str(task.problems),
            "out": str(out),
            "engine": engine,
            "steps": task.steps + 1,
            "seed": seed,
            "prompts": task.prompts,
            "samples": task.samples,
            "response_tokens": task.response_tokens,
            "micro_batch": MICRO_BATCH,
            "learning_rate": task.learning_rate,
            "beta": task.kl_coef,
        }
        script = Path(__file__).with_name("trl_run.py")
        run_until_done([sys.executable, str(script), json.dumps(options)], task.threads, TRL_FOLDER)
        return [Step(**row) for row in json.loads(out.read_text(encoding="utf-8"))][1:]


def install_trl() -> None:
    """Put TRL into its folder, where it is not there yet; what it needs is installed with this project."""
    if not (TRL_FOLDER / "trl").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(TRL_FOLDER), TRL]
        subprocess.run(command, check=True)


def fastest(task: ShortRun, engines: list[str]) -> tuple[str, dict[str, float | str]]:
    """The engine with which TRL's steps are the shortest; and each one's median seconds, or why it cannot run here."""
    if len(engines) == 1:
        return engines[0], {}
    found: dict[str, float | str] = {}
    for engine in engines:
        try:
            found[engine] = median_seconds(steps_of_trl(replace(task, steps=STEPS_TO_CHOOSE_BY), engine, seed=0))
        except UserError as error:
            found[engine] = str(error).splitlines()[-1][:200]
    seconds = {engine: value for engine, value in found.items() if isinstance(value, float)}
    if not seconds:
        raise UserError(f"TRL runs with none of these engines here: {found}")
    return min(seconds, key=lambda engine: seconds[engine]), found


def median_seconds(steps: list[Step]) -> float:
    """Of a step."""
    return statistics.median(step.seconds for step in steps)


def summary(steps: list[Step]) -> dict[str, Any]:
    """Medians of an arm, and its rewards in order."""
    return {
        "seconds": median_seconds(steps),
        "tokens_per_s": statistics.median(step.tokens / step.seconds for step in steps),
        "tokens": statistics.median(step.tokens for step in steps),
        "rewards": [round(step.reward, 3) for step in steps],
    }


@exit_on_user_error
def main(
    quickstart: Annotated[Path, typer.Argument(help="output folder of a finished quickstart")] = ROOT
    / "outputs/quickstart",
    steps: Annotated[int, typer.Option(min=2, help="of each arm that are counted, in all turns")] = 8,
    turns: Annotated[int, typer.Option(min=1, help="runs of each arm, one after the other")] = 2,
    engines: Annotated[str, typer.Option(help=f"of TRL to choose from: {', '.join(ENGINES)}")] = "generate,vllm",
    threads: Annotated[int | None, typer.Option(min=1, help="of each process; by default all cores")] = None,
    out: Annotated[Path, typer.Option(help="the JSON file to write")] = ROOT / "bench/results/against_trl.json",
) -> None:
    """Compare this trainer with TRL."""
    if unknown := [name for name in engines.split(",") if name not in ENGINES]:
        raise UserError(f"--engines: {unknown[0]} is unknown, use some of {', '.join(ENGINES)}")
    task = ShortRun(quickstart, steps_of_a_turn(steps, turns), threads or len(os.sched_getaffinity(0)))
    task.check()
    install_trl()
    engine, tried = fastest(task, engines.split(","))
    arms: dict[str, Callable[[int], list[Step]]] = {
        "trl": partial(steps_of_trl, task, engine),
        "ours": partial(steps_here, task),
        "ours_without_scores": lambda seed: steps_here(task, seed, "actor_rollout_ref.use_score=false"),
    }
    found: dict[str, list[Step]] = {name: [] for name in arms}
    for turn, name in tqdm(list(in_turns(arms, turns)), desc="runs"):
        found[name] += arms[name](turn)
    seconds = {f"{name}_seconds": median_seconds(of_arm) for name, of_arm in found.items()}
    result = {
        "benchmark": "against_trl",
        "trl": TRL,
        "trl_engine": engine,
        "engines_tried": tried,
        "arms": {name: summary(of_arm) for name, of_arm in found.items()},
        **seconds,
        "trl_over_ours": seconds["trl_seconds"] / seconds["ours_seconds"],
        "machine": describe_machine(),
    }
    report(rounded(result), out)


if __name__ == "__main__":
    typer.run(main)
