"""Metrics in a file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from verl.utils.trackers.backend import Backend, TrackedRun
from xbai.errors import UserError
from xbai.files import atomic_write, write_all

METRICS_FILE = "metrics.jsonl"


class FileBackend(Backend):
    """Appends `{"step": n, name: value, ...}` lines; a resumed run first drops the steps it is about to repeat."""

    def __init__(self, run: TrackedRun) -> None:
        path = run.folder / METRICS_FILE
        kept = _lines_up_to(run.resume_step, path) if run.resume_step else []
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
