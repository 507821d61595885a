"""How long a training step takes when lengths have a long tail: in today's order, with partial rollouts, one step off.

    python bench/async.py [--steps 16] [--seeds 3] [--out FILE]

The scheduling is the trainer's own (`PooledRollouts` on a `RolloutPool`; what `OneStepOff` has run at the same time is
taken to take the longer of both times); engines, training and the clock are simulated. A step of an engine takes a
fixed time and some more for each sequence in its batch, what goes on in another step is computed anew up to where it
was, and lengths are log-normal, over prompts and over the responses to one, cut at the limit. There is a 1.5B model on
8 GPUs with 8k tokens, and a 32B one on 128 GPUs with 32k; their constants are estimates for H100s from a roofline of
this trainer (`bench/roofline.py`), not measurements.

The ideal is to sample the same tokens with all slots filled, and then to train on them, with all GPUs. One step off
splits the GPUs, in the best way for the case. Figures are mean steps over the ideal; the first steps, in which the pool
fills, are left out. The last line is one JSON object.
"""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from machine import ROOT, report, rounded
from tqdm import tqdm

from verl.protocol import DataProto
from verl.trainer.config.compose import compose_config
from verl.trainer.config.schema import YAML, PPOConfig
from verl.trainer.config.validation import validated
from verl.trainer.ppo.pooled_rollouts import PooledRollouts
from verl.trainer.ppo.rollout_pool import RolloutPool
from xbai.errors import exit_on_user_error
from xbai.seeds import derived_seed

UNIT = 32
"""Tokens that one of the simulation stands for."""
PROMPT = 512 // UNIT
SETTLING = 4
"""Steps that are left out."""


@dataclass(frozen=True)
class Case:
    """A model on a machine; seconds, of real tokens."""

    gpus: int
    gpus_per_engine: int
    prompts: int
    longest: int
    median: int
    sigma: float
    """Of the logarithm of a length: half of its square is the prompt's, half the response's."""
    step_s: float
    """Of an engine, whatever its batch."""
    step_per_sequence_s: float
    prefill_per_token_s: float
    """Of an engine."""
    train_per_token_s: float
    """Of all GPUs: log-probs of policy and reference, and the update."""
    weight_sync_s: float
    samples: int = 8

    @property
    def engines(self) -> int:
        """On all GPUs."""
        return self.gpus // self.gpus_per_engine

    @property
    def slots(self) -> int:
        """Of an engine: a batch fills those of all GPUs once."""
        return self.prompts * self.samples // self.engines

    def ideal_s(self, tokens: float) -> float:
        """Of a step with so many."""
        sampling = tokens / self.engines / self.slots * (self.step_s + self.step_per_sequence_s * self.slots)
        return sampling + tokens * self.train_per_token_s + self.weight_sync_s


CASES = (
    Case(8, 1, 32, 8192, 4500, 0.8, 3.5e-3, 0.03e-3, 1.2e-5, 1.0e-5, 0.75),
    Case(128, 8, 128, 32768, 9000, 0.9, 8e-3, 0.12e-3, 1.7e-5, 6.8e-6, 3.0),
)


@dataclass
class Row:
    """A response: the tokens that it had, that it wants in the end, and that it has."""

    had: int
    wants: int
    has: int


def sample(case: Case, rows: Sequence[Row], until: float = math.inf) -> list[float]:
    """Have an engine go on with rows, the first ones first, up to a time; when each has ended, infinite if later."""
    ends, waiting, running = [math.inf] * len(rows), list(range(len(rows)))[::-1], []
    clock = sampled = 0
    while waiting or running:
        while waiting and len(running) < case.slots:
            place = waiting.pop()
            clock += case.prefill_per_token_s * UNIT * (PROMPT + rows[place].had)
            heapq.heappush(running, (sampled + rows[place].wants - rows[place].had, place, sampled))
        step_s = UNIT * (case.step_s + case.step_per_sequence_s * len(running))
        left = running[0][0] - sampled
        steps = left if until == math.inf else max(0, min(left, round((until - clock) / step_s)))
        clock, sampled = clock + steps * step_s, sampled + steps
        if running[0][0] > sampled:
            break
        while running and running[0][0] <= sampled:
            place = heapq.heappop(running)[1]
            ends[place], rows[place].has = clock, rows[place].wants
    for _, place, begun in running:
        rows[place].has = rows[place].had + sampled - begun
    return ends


class Proceed:
    """Stands for `PolicyWorkers.proceed`; `seconds` adds up what its calls have taken."""

    def __init__(self, case: Case, engines: int, seed: int) -> None:
        self.shares, self.seconds = engines, 0.0
        self._case, self._seed = case, seed

    def __call__(self, parts: Sequence[DataProto], wanted: int) -> list[DataProto]:
        rows = [self._rows(part) for part in parts]
        ends: dict[str, float] = {}
        for part, of_engine in zip(parts, rows, strict=True):
            for uid, end in zip(part.non_tensor_batch["uid"], sample(self._case, of_engine), strict=True):
                ends[uid] = max(end, ends.get(uid, 0.0))
        stop = sorted(ends.values())[min(wanted, len(ends)) - 1]
        self.seconds += stop
        for of_engine in rows:
            for row in of_engine:
                row.has = row.had
            sample(self._case, of_engine, until=stop * (1 + 1e-12))
        return [self._answer(of_engine) for of_engine in rows]

    def _rows(self, part: DataProto) -> list[Row]:
        """A response's first token says how many it wants."""
        columns = part.non_tensor_batch
        begun = zip(columns["uid"], columns["token_ids"], columns["seed"], strict=True)
        return [
            Row(len(ids), int(ids[0]) if len(ids) else self._wants(uid, seed), len(ids)) for uid, ids, seed in begun
        ]

    def _wants(self, uid: str, seed: int) -> int:
        case, share = self._case, self._case.sigma * math.sqrt(0.5)
        of_prompt, of_response = (
            np.random.default_rng(derived_seed(self._seed, part)).normal(0, share) for part in (uid, f"{uid}/{seed}")
        )
        length = min(case.longest, case.median * math.exp(of_prompt + of_response))
        return max(1, round(length / UNIT))

    def _answer(self, rows: Sequence[Row]) -> DataProto:
        added = [np.full(row.has - row.had, row.wants, np.int32) for row in rows]
        columns = {
            "token_ids": added,
            "log_probs": [np.zeros(len(ids), np.float32) for ids in added],
            "has_ended": [row.has >= row.wants for row in rows],
        }
        return DataProto.from_dict(columns, meta_info={"metrics": {}})


class Prompts:
    """Stands for `PromptData`: prompts without words, of one length."""

    pad_token_id = 0

    def __init__(self, case: Case, seed: int) -> None:
        self._case, self._seed = case, seed

    def batches(self) -> Iterator[Mapping[str, Any]]:
        """As many as are asked for."""
        for first in itertools.count(step=self._case.prompts):
            yield self.collated([{"row_index": first + place} for place in range(self._case.prompts)])

    def collated(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The columns of a batch."""
        shape = len(items), PROMPT
        columns = {key: torch.ones(shape, dtype=torch.long) for key in ("input_ids", "attention_mask", "position_ids")}
        kept = [key for key in items[0] if key not in columns]
        return columns | {key: np.array([item[key] for item in items], object) for key in kept}

    def seeded(self, columns: Mapping[str, Any], occasion: int) -> DataProto:
        """With a name and a seed for each prompt."""
        prompts = DataProto.from_dict(dict(columns))
        rows = prompts.non_tensor_batch["row_index"]
        prompts.non_tensor_batch["seed"] = np.array([derived_seed(self._seed, row) for row in rows], object)
        prompts.non_tensor_batch["uid"] = np.array([str(row) for row in rows], object)
        return prompts


@dataclass(frozen=True)
class Step:
    """One that was simulated: how long its rollouts took, and what they hold."""

    rollout_s: float
    tokens: float


def rollouts(case: Case, engines: int, steps: int, seed: int, overrides: Sequence[str], ahead: int = 0) -> list[Step]:
    """The steps of a run after those in which it settles, sampled so many steps ahead."""
    given = [
        "data.train_files=none",
        "actor_rollout_ref.model.path=none",
        f"data.train_batch_size={case.prompts}",
        f"data.max_response_length={case.longest // UNIT}",
        f"actor_rollout_ref.rollout.n={case.samples}",
        *overrides,
    ]
    config = validated(PPOConfig, compose_config(YAML, given), YAML)
    prompts, proceed = Prompts(case, seed), Proceed(case, engines, seed)
    pooled = PooledRollouts(config, RolloutPool(config, prompts), None)
    workers, batches, found = SimpleNamespace(proceed=proceed, end_rollout=lambda: None), prompts.batches(), []
    for step in range(1, SETTLING + steps + 1):
        before = proceed.seconds
        pooled.fill(batches, workers, step, version=max(1, step - ahead))
        batch, _ = pooled.take(step, {})
        found.append(Step(proceed.seconds - before, UNIT * float(batch.batch["response_mask"].sum())))
    return found[SETTLING:]


def colocated(case: Case, found: Sequence[Step]) -> list[float]:
    """Steps over the ideal where all GPUs sample, and then train."""
    return [
        (one.rollout_s + one.tokens * case.train_per_token_s + case.weight_sync_s) / case.ideal_s(one.tokens)
        for one in found
    ]


def apart(case: Case, engines: int, found: Sequence[Step]) -> list[float]:
    """Steps over the ideal where some engines sample the next batch while the other GPUs train on this one."""
    slower = case.engines / (case.engines - engines)
    return [
        (max(later.rollout_s, one.tokens * case.train_per_token_s * slower) + case.weight_sync_s)
        / case.ideal_s(one.tokens)
        for one, later in itertools.pairwise(found)
    ]


def best_split(case: Case, steps: int, seeds: int, overrides: Sequence[str]) -> dict[str, float]:
    """Of all numbers of engines that leave GPUs to train on, the one with the shortest steps."""
    means = {
        engines: statistics.fmean(
            each
            for seed in range(seeds)
            for each in apart(case, engines, rollouts(case, engines, steps, seed, overrides, ahead=1))
        )
        for engines in range(case.engines // 2, case.engines)
    }
    engines = min(means, key=lambda engines: means[engines])
    return {"over_ideal": means[engines], "rollout_gpus": engines * case.gpus_per_engine}


@exit_on_user_error
def main(
    steps: Annotated[int, typer.Option(min=2, help="of each run, after it has settled")] = 16,
    seeds: Annotated[int, typer.Option(min=1, help="of the lengths; a run each")] = 3,
    over_sampling: Annotated[float, typer.Option(min=0, help="of partial rollouts")] = 1.5,
    max_staleness: Annotated[int, typer.Option(min=1, help="of partial rollouts")] = 3,
    out: Annotated[Path, typer.Option(help="the JSON file to write")] = ROOT / "bench/results/async.json",
) -> None:
    """Simulate every case and mode, and write the figures."""
    partial = (
        "actor_rollout_ref.rollout.mode=partial",
        "actor_rollout_ref.actor.rollout_is=token",
        f"actor_rollout_ref.rollout.over_sampling={over_sampling}",
        f"actor_rollout_ref.rollout.max_staleness={max_staleness}",
    )
    results = []
    for case in tqdm(CASES, desc="cases"):
        together = {
            mode: statistics.fmean(
                each
                for seed in range(seeds)
                for each in colocated(case, rollouts(case, case.engines, steps, seed, given))
            )
            for mode, given in (("sync", ()), ("partial", partial))
        }
        alone, both = (best_split(case, steps, seeds, given) for given in ((), partial))
        results.append(
            {
                "gpus": case.gpus,
                "sync_over_ideal": together["sync"],
                "partial_over_ideal": together["partial"],
                "one_step_off_over_ideal": alone["over_ideal"],
                "both_over_ideal": both["over_ideal"],
                "rollout_gpus": {"one_step_off": alone["rollout_gpus"], "both": both["rollout_gpus"]},
            }
        )
    *smaller, largest = results
    settings = {"steps": steps, "seeds": seeds, "over_sampling": over_sampling, "max_staleness": max_staleness}
    smaller_cases = {f"{case['gpus']} GPUs": case for case in smaller}
    report(rounded(largest | {"benchmark": "async", **smaller_cases, "settings": settings}), out)


if __name__ == "__main__":
    typer.run(main)
