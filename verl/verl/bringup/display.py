"""What a bring-up says on the terminal: a line a step while it runs, and the table at the end."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from verl.bringup.report import Report
from verl.bringup.runner import Outcome
from verl.bringup.step import Step

STYLES = {"pass": "green", "fail": "bold red", "skipped": "yellow"}


def machine(found: dict[str, Any]) -> None:
    """What is checked, and that it is a rehearsal where it is one."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    _line(f"{found['device']}; {versions}")
    if found["rehearsal"]:
        _line("No GPU: this is a REHEARSAL ON THE CPU with tiny models, it says nothing of any GPU.")


def started(step: Step, number: int, total: int) -> None:
    """Say what runs; on a terminal the outcome will take this line's place."""
    if sys.stdout.isatty():
        sys.stdout.write(f"[{number}/{total}] {step.name} …")
        sys.stdout.flush()


def ended(step: Step, outcome: Outcome, number: int, total: int) -> None:
    """The step's line, and below a failure what it means."""
    clear = "\r\033[K" if sys.stdout.isatty() else ""
    status = {"pass": "PASS", "fail": "FAIL"}.get(outcome.status, outcome.status)
    _line(f"{clear}[{number}/{total}] {status} {step.name} ({outcome.seconds:.1f} s): {outcome.figure}")
    if outcome.status == "fail":
        _line(f"    what it means: {step.means}")


def names(steps: list[Step]) -> None:
    """Each step, what it needs, and what a failure means."""
    for step in steps:
        needs = f" (needs {', '.join(step.needs)})" if step.needs else ""
        _line(f"{step.name}{needs}{' [quick]' if step.quick else ''}: {step.means}")


def summary(report: Report) -> None:
    """The table of all steps, and where the report lies."""
    _table(report)
    counts = {"passed": "pass", "failed": "fail", "skipped": "skipped"}
    counted = ", ".join(f"{report.count(status)} {word}" for word, status in counts.items())
    rehearsed = " (rehearsed on the CPU)" if report.machine["rehearsal"] else ""
    _line(f"{counted}{rehearsed}. The report: {report.path}; logs: {report.path.with_suffix('')}")


def _table(report: Report) -> None:
    table = Table("step", "status", "figure", "s")
    table.columns[3].justify = "right"
    for entry in report.steps:
        status = Text(entry["status"], STYLES[entry["status"]])
        table.add_row(entry["name"], status, Text(entry["figure"]), f"{entry['seconds']:.1f}")
    Console().print(table)


def _line(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
