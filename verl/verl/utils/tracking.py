"""Where a run's metrics go: console, jsonl file, and the trackers of others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from verl.utils.trackers.backend import Backend, Table, TrackedRun
from verl.utils.trackers.console import ConsoleBackend
from verl.utils.trackers.file import METRICS_FILE, FileBackend
from verl.utils.trackers.mlflow import MlflowBackend
from verl.utils.trackers.swanlab import SwanlabBackend
from verl.utils.trackers.tensorboard import TensorboardBackend
from verl.utils.trackers.trackio import TrackioBackend
from verl.utils.trackers.wandb import WandbBackend
from xbai.errors import UserError
from xbai.files import why_not_written

__all__ = ["BACKENDS", "METRICS_FILE", "WITH_TABLES", "Tracking", "check_backends"]

BACKENDS: Mapping[str, type[Backend]] = {
    "console": ConsoleBackend,
    "file": FileBackend,
    "tensorboard": TensorboardBackend,
    "wandb": WandbBackend,
    "trackio": TrackioBackend,
    "mlflow": MlflowBackend,
    "swanlab": SwanlabBackend,
}
PACKAGES = ("tensorboard", "wandb", "trackio", "mlflow", "swanlab")
"""Those that need a package of the same name."""
WITH_TABLES = tuple(name for name, kind in BACKENDS.items() if kind.log_samples is not Backend.log_samples)
"""Those that show samples."""


def check_backends(names: Sequence[str], not_found: Callable[[str], None]) -> None:
    """Raise a `UserError` for an unknown name in `trainer.logger`; `not_found` takes what is said of a package that is
    missing here."""
    if unknown := [name for name in names if name not in BACKENDS]:
        raise UserError(f"trainer.logger: {unknown[0]} is unknown, use some of {', '.join(BACKENDS)}")
    for name in names:
        if name in PACKAGES and find_spec(name) is None:
            not_found(f"trainer.logger: {name} is not installed; pip install {name}, or leave it out")


class Tracking(AbstractContextManager["Tracking"]):
    """Sends each step's metrics to every chosen backend.

    Args:
        backends: names out of `BACKENDS`.
        output_dir: holds `metrics.jsonl` and the files of the others.
        config: recorded where the backend can.
        resume_step: the last step that stands; what an interrupted run logged after it is dropped from the file and
            from tensorboard, and shown beside the new steps by the others. 0 starts afresh.

    Raises:
        UserError: an unknown backend, one that cannot be used, or files that cannot be written.
    """

    def __init__(
        self,
        project_name: str,
        experiment_name: str,
        backends: Sequence[str],
        output_dir: str | Path,
        config: Mapping[str, Any] | None = None,
        resume_step: int = 0,
    ) -> None:
        self._folder = folder = Path(output_dir)
        run = TrackedRun(project_name, experiment_name, folder, config or {}, resume_step)
        if unknown := [name for name in backends if name not in BACKENDS]:
            raise UserError(f"trainer.logger: unknown logger {unknown[0]!r}, use some of {', '.join(BACKENDS)}")
        self._backends: list[Backend] = []
        with self._written():
            folder.mkdir(parents=True, exist_ok=True)
            for name in backends:
                self._backends.append(BACKENDS[name](run))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record one step; a value that is nan (undefined for this batch) is left out."""
        defined = {name: float(value) for name, value in metrics.items() if not math.isnan(value)}
        with self._written():
            for backend in self._backends:
                backend.log(defined, step)

    def log_samples(self, samples: Table, step: int) -> None:
        """Show some samples of a step as a table of each backend that has tables; none are no table."""
        with self._written():
            for backend in self._backends if samples else ():
                backend.log_samples(samples, step)

    def __exit__(self, *_: object) -> None:
        for backend in self._backends:
            backend.close()

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self._folder}: no metrics can be written ({why_not_written(error)})") from error
