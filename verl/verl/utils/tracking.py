"""Where a run's metrics go: console, jsonl file, tensorboard, wandb."""

from __future__ import annotations

import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from xbai.errors import UserError
from xbai.files import atomic_write, why_not_written, write_all

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class Backend(Protocol):
    """One destination of metrics."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the metrics of one step."""

    def close(self) -> None:
        """Flush and let go."""


class ConsoleBackend:
    """One log record a step: a line for each part of the names before the slash, of `perf/` the speeds and shares."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        groups: dict[str, list[str]] = {}
        for name, value in metrics.items():
            group, _, short = name.rpartition("/")
            if group == "perf" and not short.endswith(("tokens_per_s", "_share")):
                continue
            groups.setdefault(group, []).append(f"{short} {value:.4g}")
        lines = [f"  {group or 'other'}: {', '.join(values)}" for group, values in groups.items()]
        logger.info("\n".join([f"step {step}", *lines]))

    def close(self) -> None:
        """Nothing is held."""


class FileBackend:
    """Appends `{"step": n, name: value, ...}` lines; a resumed run first drops the steps it is about to repeat."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = _lines_up_to(resume_step, path) if resume_step else []
        with atomic_write(path, "w") as stream:
            stream.writelines(f"{line}\n" for line in kept)
        # Unbuffered: what a full disk did not take is not tried again at the end.
        self._stream = path.open("ab", buffering=0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        write_all(self._stream, (json.dumps({"step": step, **metrics}) + "\n").encode())

    def close(self) -> None:
        self._stream.close()


def _lines_up_to(step: int, path: Path) -> list[str]:
    """The lines of `path` up to a step, without one that has no newline: a killed run may leave half of one."""
    if not path.exists():
        return []
    kept = []
    for number, line in enumerate(path.read_text(errors="replace", encoding="utf-8").splitlines(keepends=True), 1):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line.rstrip("\n"))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: no metrics of a step ({error!r:.100}); remove the line") from None
    return kept


class TensorboardBackend:
    """Event files below `folder`."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(folder), purge_step=resume_step + 1 if resume_step else None)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


STEP_METRIC = "trainer/step"
"""What wandb draws the others over: its own steps only rise, and a resumed run repeats some."""


class WandbBackend:
    """A wandb run that a resumed training continues; offline without an API key or a connection, or by WANDB_MODE.

    Steps that a resumed run repeats are there twice: wandb keeps what the interrupted one logged of them.
    """

    def __init__(
        self, project: str, experiment: str, folder: Path, config: Mapping[str, Any] | None, resume_step: int
    ) -> None:
        import wandb

        id_file = folder / "wandb_run_id.txt"
        goes_on = resume_step and id_file.exists()
        run_id = id_file.read_text(encoding="utf-8").strip() if goes_on else uuid.uuid4().hex[:8]
        settings: dict[str, Any] = {"project": project, "name": experiment, "dir": str(folder), "id": run_id}
        settings |= {"config": dict(config or {}), "resume": "allow"}
        # Which values there are is for wandb to say.
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        try:
            self._run = wandb.init(**settings, mode=mode)
        except wandb.errors.CommError as error:
            logger.warning("wandb is not reachable (%s): logging offline, `wandb sync` uploads it later", error)
            self._run = wandb.init(**settings, mode="offline")
        self._run.define_metric(STEP_METRIC)
        self._run.define_metric("*", step_metric=STEP_METRIC)
        with atomic_write(id_file, "w") as stream:
            stream.write(run_id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log({**metrics, STEP_METRIC: step})

    def close(self) -> None:
        self._run.finish()


BACKENDS = ("console", "file", "tensorboard", "wandb")
PACKAGES = ("tensorboard", "wandb")
"""Those that need a package of the same name."""


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
        output_dir: holds `metrics.jsonl` and the tensorboard and wandb files.
        config: recorded where the backend can.
        resume_step: the last step that stands; what an interrupted run logged after it is dropped from the file and
            from tensorboard, and shown beside the new steps by wandb. 0 starts afresh.

    Raises:
        UserError: an unknown backend, or files that cannot be written.
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
        build: dict[str, Callable[[], Backend]] = {
            "console": ConsoleBackend,
            "file": lambda: FileBackend(folder / METRICS_FILE, resume_step),
            "tensorboard": lambda: TensorboardBackend(folder / "tensorboard", resume_step),
            "wandb": lambda: WandbBackend(project_name, experiment_name, folder, config, resume_step),
        }
        if unknown := [name for name in backends if name not in build]:
            raise UserError(f"trainer.logger: unknown logger {unknown[0]!r}, use some of {', '.join(BACKENDS)}")
        self._backends: list[Backend] = []
        with self._written():
            folder.mkdir(parents=True, exist_ok=True)
            for name in backends:
                self._backends.append(build[name]())

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record one step; a value that is nan (undefined for this batch) is left out."""
        defined = {name: float(value) for name, value in metrics.items() if not math.isnan(value)}
        with self._written():
            for backend in self._backends:
                backend.log(defined, step)

    def __exit__(self, *_: object) -> None:
        for backend in self._backends:
            backend.close()

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self._folder}: no metrics can be written ({why_not_written(error)})") from error
