"""`python -m verl.bringup [--quick] [--device cpu] [--only NAMES] [--list]`: everything a new machine must show."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated

# Asked in the usual way whether there is a GPU, CUDA cannot be used any more in forked processes.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import typer

from verl.bringup.machine import ROOT, default_device, describe, gpu_column, start_method, used_mib
from verl.bringup.report import Report, show_end, show_machine, show_names, show_start, show_summary
from verl.bringup.runner import run_step
from verl.bringup.step import Context, Step, all_steps, choose
from xbai.errors import UserError, exit_on_user_error

DEVICES = ("cpu", "cuda")
STAND_INS = 2
"""Processes that stand for GPUs in a rehearsal."""


def check(steps: list[Step], device: str, out: Path) -> Report:
    """Run the steps one after the other and write the report after each."""
    report = Report(out, describe(device))
    report.write()
    show_machine(report.machine)
    with tempfile.TemporaryDirectory(prefix="bringup_") as folder:
        devices = max(1, len(gpu_column("name"))) if device == "cuda" else STAND_INS
        used = used_mib() if device == "cuda" else ()
        context = Context(device, devices, Path(folder), used, start_method(device))
        for number, step in enumerate(steps, 1):
            place = f"{number}/{len(steps)}"
            show_start(step, place)
            outcome = run_step(step, context, out.with_suffix("") / f"{step.name}.log")
            report.add(step, outcome)
            show_end(step, outcome, place)
    report.finished = True
    report.write()
    return report


@exit_on_user_error
def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="what torch and transformers alone can show on one GPU, in minutes")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cuda or cpu (a rehearsal); without it what is here")] = None,
    only: Annotated[str | None, typer.Option(help="names of steps, separated by commas")] = None,
    list_steps: Annotated[bool, typer.Option("--list", help="the names of the steps, and what each needs")] = False,
    out: Annotated[Path, typer.Option(help="the report, JSON; logs go to a folder beside it")] = ROOT
    / "outputs/check_gpu.json",
) -> None:
    """Check this machine; exit status 1 when a step failed."""
    if device not in (None, *DEVICES):
        raise UserError(f"--device {device} is unknown, use cuda or cpu")
    device = device or default_device()
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    steps = choose(all_steps(), quick, None if only is None else only.split(","))
    if list_steps:
        show_names(steps)
        return
    # Without an end of its own, a process that is told to stop would leave its step's processes behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = check(steps, device, out)
    show_summary(report)
    raise SystemExit(int(report.count("fail") > 0))


if __name__ == "__main__":
    typer.run(main)
