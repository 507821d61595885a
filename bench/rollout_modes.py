"""Seconds of a step with real engines, by when they sample: side by side with a step that waits for all responses.

    python bench/rollout_modes.py [outputs/quickstart] [--steps 12] [--turns 2] [--out FILE]

The base and the training problems are those of a finished quickstart. Of two processes both train and sample (`sync`,
`partial`), or one trains and one samples ahead of it (`one_step_off`, `both`). The arms take turns, each time a run of
its own. What a run costs before its first step is not counted, nor are the first ones, in which partial rollouts fill
their pool, and the last one, in which nothing is sampled ahead. `tokens` are those of the responses that a step trains
on; as arms train on other ones, `..._over_sync` is of the seconds a token. The last line is one JSON object.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from machine import ROOT, describe_machine, report, rounded
from short_run import ShortRun, steps_of_a_turn
from tqdm import tqdm
from turns import in_turns

from xbai.errors import exit_on_user_error

PARTIAL, WEIGHED = "actor_rollout_ref.rollout.mode=partial", "actor_rollout_ref.actor.rollout_is=token"
SHARED, SEPARATE = "trainer.n_gpus_per_node=2", "trainer.rollout_gpus=1"
ARMS = {
    "sync": (SHARED,),
    "partial": (SHARED, PARTIAL, WEIGHED),
    "one_step_off": (SEPARATE, WEIGHED),
    "both": (SEPARATE, PARTIAL, WEIGHED),
}
WARM_UPS = 4
"""Steps until the oldest responses in flight are as old as they may be."""
SHOWN = ("rollout", "rollout_wait", "weight_sync", "old_log_prob", "ref", "update_actor")
"""Phases whose seconds are said; where engines have processes of their own, sampling goes on meanwhile."""


def summary(rows: list[dict[str, float]], responses: int) -> dict[str, Any]:
    """Of an arm's steps in all its turns, of so many responses: means, as steps of partial rollouts make up for each
    other."""

    def mean(key: str) -> float:
        return statistics.fmean(row.get(key, 0.0) for row in rows)

    seconds, tokens = mean("timing_s/step"), mean("response_length/mean") * responses
    return {
        "seconds": seconds,
        "median_seconds": statistics.median(row["timing_s/step"] for row in rows),
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "phases": {name: mean(f"timing_s/{name}") for name in SHOWN},
        "staleness": mean("rollout/staleness_mean"),
        "reward": mean("reward/mean"),
    }


@exit_on_user_error
def main(
    quickstart: Annotated[Path, typer.Argument(help="output folder of a finished quickstart")] = ROOT
    / "outputs/quickstart",
    steps: Annotated[int, typer.Option(min=2, help="of each arm that are counted, in all turns")] = 12,
    turns: Annotated[int, typer.Option(min=1, help="runs of each arm, one after the other")] = 2,
    response_tokens: Annotated[int, typer.Option(min=1, help="at most, of a response")] = 256,
    threads: Annotated[int, typer.Option(min=1, help="of each process")] = 1,
    out: Annotated[Path, typer.Option(help="the JSON file to write")] = ROOT / "bench/results/rollout_modes_cpu.json",
) -> None:
    """Compare the modes of sampling."""
    counted = steps_of_a_turn(steps, turns)
    task = ShortRun(quickstart, counted, threads, WARM_UPS, last_ones=1, response_tokens=response_tokens)
    task.check()
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for turn, name in tqdm(list(in_turns(ARMS, turns)), desc="runs"):
        rows[name] += task.run(turn, *ARMS[name])
    arms = {name: summary(of_arm, task.prompts * task.samples) for name, of_arm in rows.items()}
    speed = {name: arm["tokens_per_s"] for name, arm in arms.items()}
    ratios = {f"{name}_over_sync": speed["sync"] / speed[name] for name in ARMS if name != "sync"}
    sizes = {"prompts": task.prompts, "samples": task.samples, "steps": steps, "turns": turns}
    # Of the runs, not of this process.
    machine = describe_machine() | {"threads": threads}
    report(rounded({"benchmark": "rollout_modes", **sizes, "arms": arms, **ratios, "machine": machine}), out)


if __name__ == "__main__":
    typer.run(main)
