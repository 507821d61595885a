"""The progress bar of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report = Callable[[int, Mapping[str, float]], None]


@contextmanager
def progress_bar(total: int, done: int, folder: Path) -> Iterator[Report]:
    """Show steps, time and the folder that checkpoints go to; the function it yields takes a step and its metrics."""
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn(f"→ {folder}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("", total=total, completed=done)

        def report(step: int, metrics: Mapping[str, float]) -> None:
            text = f"reward {metrics['reward/mean']:.3f}  {metrics['timing_s/step']:.1f} s/step"
            if math.isfinite(value := metrics.get("score/within_prompt_auc", math.nan)):
                text = f"within-prompt AUC {value:.2f}  {text}"
            progress.update(task, completed=step, description=text)

        yield report
