"""A step: one thing that a machine must show, what it needs, and what it means where it fails."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkContext, SpawnContext
from pathlib import Path
from typing import Any

import torch

from verl.bringup.machine import gpu_column
from xbai.errors import UserError

SUBJECTS = (
    *("kernels", "scorer", "placement", "training", "generation"),
    *("throughput", "ranks", "engines", "service", "runs"),
)
"""The modules that hold the steps, in their order: what most of the rest stands on comes first."""

MOST_PROCESSES = 8
GIB = 2**30


class CheckFailed(Exception):  # noqa: N818 (it says what happened, as pytest's own)
    """A figure that is not what it must be; the message has it."""


def require(condition: bool, message: str) -> None:
    """Fail the step unless `condition`."""
    if not condition:
        raise CheckFailed(message)


def seconds(run: Callable[[], Any], repeats: int = 1) -> float:
    """That `run` takes on average, until the GPU has done what it was asked for."""
    started = _now()
    for _ in range(repeats):
        run()
    return (_now() - started) / repeats


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Context:
    """Where a step runs.

    Attributes:
        device: `cuda`, or `cpu` for a rehearsal.
        devices: visible GPUs; on CPU processes that stand for them.
        work: a folder that all steps share; it goes with the last of them.
        used_mib: what others held of each GPU's memory before the first step; empty where that is not known.
        start_method: of processes that use CUDA: `fork` where that works here, else `spawn`.
    """

    device: str
    devices: int
    work: Path
    used_mib: tuple[int, ...] = ()
    start_method: str = "fork"

    @property
    def processes(self) -> ForkContext | SpawnContext:
        """What starts processes that use CUDA."""
        return get_context("fork") if self.start_method == "fork" else get_context("spawn")

    @property
    def process_count(self) -> int:
        """How many GPUs work together: a power of two, so that rows and heads divide."""
        return 1 << (min(self.devices, MOST_PROCESSES).bit_length() - 1)

    @property
    def on_gpu(self) -> bool:
        """Whether this is no rehearsal."""
        return self.device == "cuda"


@dataclass(frozen=True)
class Step:
    """One entry of the report.

    Attributes:
        run: does it and returns its figure, one line; raises `CheckFailed`, or anything else.
        means: what a failure means and where to look.
        needs: see `missing`.
        limit_s: seconds after which it counts as hung.
        quick: whether it is one of those that torch and transformers alone can show in a few minutes.
    """

    run: Callable[[Context], str]
    means: str
    needs: tuple[str, ...] = ()
    limit_s: float = 180.0
    quick: bool = False

    @property
    def name(self) -> str:
        """Of the function, which is unique among all steps."""
        return self.run.__name__

    def missing(self, context: Context) -> str | None:
        """The first of what the step needs that is not here; None where nothing lacks."""
        return next((need for need in self.needs if not _is_here(need, context)), None)


def step(
    *, means: str, needs: Iterable[str] = (), limit_s: float = 180.0, quick: bool = False
) -> Callable[[Callable[[Context], str]], Step]:
    """Decorate a function as a step, see `Step`."""
    return lambda run: Step(run, means, tuple(needs), limit_s, quick)


def _is_here(need: str, context: Context) -> bool:
    """`gpu`, `memory in use` of each, `2 devices`, `40 GiB` of a GPU, `compiler`, or an importable module's name."""
    if need == "gpu":
        return context.on_gpu
    if need == "memory in use":
        return bool(context.used_mib)
    if need == "compiler":
        return any(map(shutil.which, ("gcc", "clang", "cc") if context.on_gpu else ("g++", "clang++")))
    number, _, what = need.partition(" ")
    if what == "devices":
        return context.devices >= int(number)
    if what == "GiB":
        totals = gpu_column("memory.total") if context.on_gpu else []
        return all(int(total) >= 1024 * int(number) for total in totals if total.isdecimal())
    return importlib.util.find_spec(need) is not None


def all_steps() -> list[Step]:
    """Every step, in the order in which they run."""
    modules = (importlib.import_module(f"verl.bringup.{subject}") for subject in SUBJECTS)
    return [value for module in modules for value in vars(module).values() if isinstance(value, Step)]


def choose(steps: Sequence[Step], quick: bool, only: Sequence[str] | None) -> list[Step]:
    """Those that were asked for, in their order; a `UserError` for a name that no step has."""
    names = [one.name for one in steps]
    if unknown := [name for name in only or () if name not in names]:
        raise UserError(f"--only {unknown[0]}: no such step, use some of {','.join(names)}")
    if only is not None:
        return [one for one in steps if one.name in only]
    return [one for one in steps if one.quick or not quick]
