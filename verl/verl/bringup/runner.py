"""Each step in a process of its own: whatever becomes of it, the next one starts on a machine as it found it."""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from verl.bringup.step import CheckFailed, Context, Step
from xbai.errors import UserError

TAIL_LINES, FIGURE_CHARACTERS = 60, 300
END_S = 10.0
STDERR = 2


@dataclass(frozen=True)
class Outcome:
    """How a step ended.

    Attributes:
        status: `pass`, `fail` or `skipped`.
        figure: what it measured, what is wrong, or what it lacks; one line.
        seconds: that it took.
        peak_gib: most GPU memory that torch had in the step's own process.
        details: of a failure: the traceback where there is one, and the last lines that the process wrote.
    """

    status: str
    figure: str
    seconds: float = 0.0
    peak_gib: float | None = None
    details: str | None = None


def run_step(step: Step, context: Context, log: Path) -> Outcome:
    """Run a step; it fails when it raises, when its process dies, and when it takes longer than it may.

    The step is a global of its module. What its process writes to its standard streams goes to the file `log`.
    """
    if (missing := step.missing(context)) is not None:
        return Outcome("skipped", f"needs {missing}")
    log.parent.mkdir(parents=True, exist_ok=True)
    receiver, sender = context.processes.Pipe(duplex=False)
    arguments = (step.run.__module__, step.name, context, log, sender)
    process = context.processes.Process(target=_be_the_process, args=arguments, name=step.name)
    started = time.monotonic()
    process.start()
    sender.close()
    try:
        outcome = _outcome(process, receiver, step.limit_s)
    finally:
        _end(process)
    outcome = replace(outcome, seconds=time.monotonic() - started)
    if outcome.status == "pass":
        return outcome
    written = log.read_text(errors="replace", encoding="utf-8").splitlines()[-TAIL_LINES:]
    return replace(outcome, details="\n".join([outcome.details or "", *written]).strip())


def _outcome(process: BaseProcess, receiver: Connection, limit_s: float) -> Outcome:
    if not wait([receiver, process.sentinel], limit_s):
        return Outcome("fail", f"took longer than {limit_s:g} s")
    with suppress(EOFError):
        if receiver.poll():
            return receiver.recv()
    process.join(END_S)
    status = process.exitcode
    if status is not None and status < 0:
        return Outcome("fail", f"the process died of {signal.Signals(-status).name}")
    return Outcome("fail", f"the process ended with status {status} and no figure")


def _end(process: BaseProcess) -> None:
    """End the process and all that it started."""
    if process.pid is not None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    # It may not have had a group of its own yet.
    process.kill()
    process.join()


def _be_the_process(module: str, name: str, context: Context, log: Path, sender: Connection) -> None:
    os.setsid()
    with log.open("wb") as stream:
        for descriptor in (1, STDERR):
            os.dup2(stream.fileno(), descriptor)
    # Also a segmentation fault shows where it was.
    faulthandler.enable(STDERR)
    # It kept the parent off CUDA; here it would keep torch from noticing a driver that is too old.
    os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    step: Step = getattr(importlib.import_module(module), name)
    try:
        outcome = Outcome("pass", step.run(context), peak_gib=_peak_gib())
    except Exception as error:
        kind = "" if isinstance(error, (CheckFailed, UserError)) else f"{type(error).__name__}: "
        outcome = Outcome("fail", _one_line(f"{kind}{error}"), details=traceback.format_exc())
    sender.send(outcome)
    sys.stdout.flush()
    sys.stderr.flush()
    # A device in an error state may never let the interpreter end.
    os._exit(0)


def _one_line(text: str) -> str:
    joined = " ".join(text.split())
    return joined if len(joined) <= FIGURE_CHARACTERS else f"{joined[: FIGURE_CHARACTERS - 1]}…"


def _peak_gib() -> float | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)
