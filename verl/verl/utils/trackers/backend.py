"""What a destination of metrics is, and what it is told of the run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xbai.files import atomic_write

Table = Sequence[Mapping[str, Any]]
"""Rows with the same columns: texts, numbers and None."""
SAMPLES = "samples"
"""What the table of them is called."""


@dataclass(frozen=True)
class TrackedRun:
    """The run whose metrics are logged."""

    project: str
    experiment: str
    folder: Path
    """Of its own; there already."""
    config: Mapping[str, Any] = field(default_factory=dict)
    resume_step: int = 0
    """The last step that stands; 0 for a run that starts afresh."""

    def kept_id(self, service: str) -> str | None:
        """By what a service knows the run that is gone on with; None where it is to begin one."""
        file = self._id_file(service)
        return file.read_text(encoding="utf-8").strip() if self.resume_step and file.exists() else None

    def keep_id(self, service: str, run_id: str) -> None:
        """Note it for whoever resumes the run."""
        with atomic_write(self._id_file(service), "w") as stream:
            stream.write(run_id)

    def _id_file(self, service: str) -> Path:
        return self.folder / f"{service}_run_id.txt"


class Backend(ABC):
    """One destination; made of a run, it raises a `UserError` where it cannot be used."""

    @abstractmethod
    def __init__(self, run: TrackedRun) -> None: ...

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the metrics of one step."""

    def log_samples(self, samples: Table, step: int) -> None:  # noqa: B027 (not all have tables)
        """Show some samples of a step as a table; one without tables shows none."""

    @abstractmethod
    def close(self) -> None:
        """Flush and let go."""
