"""The report of a bring-up, whole on the disk after every step."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl.bringup.runner import Outcome
from verl.bringup.step import Step
from xbai.files import atomic_write


@dataclass
class Report:
    """What was found so far.

    Attributes:
        path: of the JSON file.
        machine: what is said of it, `device` first.
        steps: `name status figure seconds`, of a failure also `what_it_means` and `details`.
        finished: whether all steps have run.
    """

    path: Path
    machine: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False

    def add(self, step: Step, outcome: Outcome) -> None:
        """Write the file with one more step."""
        entry: dict[str, Any] = {
            "name": step.name,
            "status": outcome.status,
            "figure": outcome.figure,
            "seconds": round(outcome.seconds, 2),
        }
        if outcome.peak_gib is not None:
            entry["peak_gib"] = outcome.peak_gib
        if outcome.status == "fail":
            entry |= {"what_it_means": step.means, "details": outcome.details}
        self.steps.append(entry)
        self.write()

    def count(self, status: str) -> int:
        """How many steps ended so."""
        return sum(entry["status"] == status for entry in self.steps)

    def write(self) -> None:
        """Replace the file."""
        with atomic_write(self.path, "w") as stream:
            json.dump(self.machine | {"finished": self.finished, "steps": self.steps}, stream, indent=1)
            stream.write("\n")
