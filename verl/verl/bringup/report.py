"""What a bring-up says: a line a step while it runs, a table at the end, and a report, whole on the disk throughout."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from verl.bringup.runner import Outcome
from verl.bringup.step import Step
from xbai.files import atomic_write

STYLES = {"pass": "green", "fail": "bold red", "skipped": "yellow"}


@dataclass
class Report:
    """What was found so far.

    Attributes:
        machine: what is said of it, `device` first.
        steps: `name status figure seconds`, of a failure also `what_it_means` and `details`.
    """

    path: Path
    machine: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False

    def add(self, step: Step, outcome: Outcome) -> None:
        """Write the file with one more step."""
        found = {key: value for key, value in vars(outcome).items() if value is not None}
        found["seconds"] = round(outcome.seconds, 2)
        if outcome.status == "fail":
            found |= {"what_it_means": step.means, "details": found.pop("details")}
        self.steps.append({"name": step.name} | found)
        self.write()

    def count(self, status: str) -> int:
        """How many steps ended so."""
        return sum(entry["status"] == status for entry in self.steps)

    def write(self) -> None:
        """Replace the file."""
        with atomic_write(self.path, "w") as stream:
            json.dump(self.machine | {"finished": self.finished, "steps": self.steps}, stream, indent=1)
            stream.write("\n")


def show_machine(found: dict[str, Any]) -> None:
    """What is checked, and that it is a rehearsal where it is one."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    _say(f"{found['device']}; {versions}\n")
    if found["rehearsal"]:
        _say("No GPU: this is a REHEARSAL ON THE CPU with tiny models, it says nothing of any GPU.\n")


def show_start(step: Step, place: str) -> None:
    """Say what runs; on a terminal the outcome will take this line's place."""
    if sys.stdout.isatty():
        _say(f"[{place}] {step.name} …")


def show_end(step: Step, outcome: Outcome, place: str) -> None:
    """The step's line, and below a failure what it means."""
    clear = "\r\033[K" if sys.stdout.isatty() else ""
    status = {"pass": "PASS", "fail": "FAIL"}.get(outcome.status, outcome.status)
    _say(f"{clear}[{place}] {status} {step.name} ({outcome.seconds:.1f} s): {outcome.figure}\n")
    if outcome.status == "fail":
        _say(f"    what it means: {step.means}\n")


def show_names(steps: list[Step]) -> None:
    """Each step, what it needs, and what a failure means."""
    for step in steps:
        needs = f" (needs {', '.join(step.needs)})" if step.needs else ""
        _say(f"{step.name}{needs}{' [quick]' if step.quick else ''}: {step.means}\n")


def show_summary(report: Report) -> None:
    """The table of all steps, and where the report lies."""
    table = Table("step", "status", "figure", "s")
    table.columns[3].justify = "right"
    for entry in report.steps:
        status = Text(entry["status"], STYLES[entry["status"]])
        table.add_row(entry["name"], status, Text(entry["figure"]), f"{entry['seconds']:.1f}")
    Console().print(table)
    counted = f"{report.count('pass')} passed, {report.count('fail')} failed, {report.count('skipped')} skipped"
    rehearsed = " (rehearsed on the CPU)" if report.machine["rehearsal"] else ""
    _say(f"{counted}{rehearsed}. The report: {report.path}; logs: {report.path.with_suffix('')}\n")


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
