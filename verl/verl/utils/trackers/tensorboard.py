"""Metrics in TensorBoard's files."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import indent
from typing import Any

from verl.utils.trackers.backend import SAMPLES, Backend, Table, TrackedRun


class TensorboardBackend(Backend):
    """Event files below the run's folder; TensorBoard shows a resumed run without the steps that it repeats."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = run.resume_step + 1 if run.resume_step else None
        self._writer = SummaryWriter(log_dir=str(run.folder / "tensorboard"), purge_step=purge_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_samples(self, samples: Table, step: int) -> None:
        self._writer.add_text(SAMPLES, "\n\n---\n\n".join(map(_as_markdown, samples)), step)

    def close(self) -> None:
        self._writer.close()


def _as_markdown(sample: Mapping[str, Any]) -> str:
    """Its columns one below the other, indented: what a model writes is not to be read as markdown."""
    texts = {name: indent(str(value), " " * 4, lambda line: True) for name, value in sample.items()}
    return "\n\n".join(f"**{name}**\n\n{text}" for name, text in texts.items())
