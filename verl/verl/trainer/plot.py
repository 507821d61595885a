"""The figure of training runs, from the metrics they logged: `python -m verl.trainer.plot`, `xbai plot training`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from verl.utils.tracking import METRICS_FILE
from xbai.cli import as_command, run_command
from xbai.errors import UserError
from xbai.measure.figure import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    RIGHT,
    WRONG,
    Line,
    draw_line,
    draw_panels,
)

SMOOTHING_POINTS = 30
PANEL_SIZE = (3.9, 2.9)
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY)
"""Of runs that are compared."""
Records = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Panel:
    """One panel of the training figure: metric names (those the run logged are drawn) and how they look."""

    title: str
    lines: Mapping[str, Line]
    percent: bool = False


TRAINING_PANELS = (
    Panel(
        "Pass rate",
        {
            "reward/pass_rate": Line("training samples", BLUE),
            "val/pass@1": Line("validation pass@1", ORANGE),
            "val/best_of_8": Line("validation Best-of-8", GREEN),
        },
        percent=True,
    ),
    Panel("Response length (tokens)", {"response_length/mean": Line("mean", BLUE)}),
    Panel(
        "Score AUC",
        {
            "score/within_prompt_auc": Line("training, within a prompt", BLUE),
            "val/within_prompt_auc": Line("validation, within a prompt", ORANGE),
            "score/auc": Line("training, all samples", PURPLE),
            "val/auc": Line("validation, all samples", GREEN),
        },
        percent=True,
    ),
    Panel("Score of a response", {"score/score_right": RIGHT, "score/score_wrong": WRONG}),
    Panel("Score loss", {"score/loss": Line("training samples", BLUE)}),
    Panel("Policy entropy (nats a token)", {"actor/entropy": Line("entropy", BLUE)}),
    Panel("KL to the reference (nats a token)", {"actor/ref_kl": Line("KL", BLUE)}),
)


@dataclass(frozen=True)
class Run:
    """What a training logged."""

    records: Records
    label: str
    color: str | None
    """Of all its curves; None for one that is not compared, whose curves each have their own."""

    def line(self, line: Line) -> Line:
        """How one of its curves looks."""
        return line if self.color is None else replace(line, label=self.label, color=self.color)


@dataclass(frozen=True)
class PlotOptions:
    """Which curves to draw, and where."""

    metrics_file: tuple[Path, ...]
    """metrics.jsonl of a training, or its folder; several are compared, each in a colour of its own."""
    output: Path
    """The figure to write: .png, .pdf or .svg."""


def plot(options: PlotOptions) -> None:
    """Draw the curves of trainings."""
    plot_training(options.metrics_file, options.output)
    typer.echo(f"wrote {options.output}")


command = as_command(plot, PlotOptions)


def plot_training(metrics_files: Sequence[Path], path: Path, unit: str = "step") -> None:
    """The curves of training runs, from the `metrics.jsonl` of each or the folder that has it, by `unit`.

    Panels without data are left out. Of several runs each curve has a panel, where every run has its colour.

    Raises:
        UserError: a file is missing, damaged, or holds none of the curves; or too many runs.
    """
    runs = _read_runs([file / METRICS_FILE if file.is_dir() else file for file in metrics_files])
    panels = [panel for panel in (TRAINING_PANELS if len(runs) == 1 else _one_a_curve()) if _has_data(panel, runs)]
    drawings = [partial(_draw_training, panel=panel, runs=runs, unit=unit) for panel in panels]
    if len(runs) > 1:
        drawings[0] = partial(_draw_with_legend, draw=drawings[0], runs=runs)
    draw_panels(path, drawings, columns=3, size=PANEL_SIZE)


def _read_runs(files: Sequence[Path]) -> list[Run]:
    if len(files) > len(COLOURS):
        raise UserError(f"--metrics_file: {len(files)} runs are too many to tell apart; give at most {len(COLOURS)}")
    folders = [file.absolute().parent.name for file in files]
    is_clear = max(Counter(folders).values()) == 1
    runs = [
        Run(_read_metrics(file), folder if is_clear else str(file), color if len(files) > 1 else None)
        for file, folder, color in zip(files, folders, COLOURS, strict=False)
    ]
    for file, run in zip(files, runs, strict=True):
        if not any(_has_data(panel, [run]) for panel in TRAINING_PANELS):
            raise UserError(f"{file}: holds none of the training curves (reward/pass_rate, score/auc, ...)")
    return runs


def _one_a_curve() -> list[Panel]:
    return [
        Panel(f"{panel.title}\n{line.label}" if len(panel.lines) > 1 else panel.title, {name: line}, panel.percent)
        for panel in TRAINING_PANELS
        for name, line in panel.lines.items()
    ]


def _has_data(panel: Panel, runs: Sequence[Run]) -> bool:
    return any(len(_series(run.records, name)[0]) for run in runs for name in panel.lines)


def _draw_with_legend(axis: Axes, draw: Callable[[Axes], None], runs: Sequence[Run]) -> None:
    """One panel, and below all of them which colour is which run's."""
    draw(axis)
    handles = [Line2D([], [], color=run.color, label=run.label, lw=1.8) for run in runs]
    axis.figure.legend(handles=handles, loc="outside lower center", ncols=3)


def _draw_training(axis: Axes, panel: Panel, runs: Sequence[Run], unit: str) -> None:
    for run in runs:
        for name, line in panel.lines.items():
            _draw_curve(axis, *_series(run.records, name), run.line(line), is_sparse=name.startswith("val/"))
    axis.set_title(panel.title)
    axis.set_xlabel(unit)
    if panel.percent:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if len(runs) == 1 and len(axis.get_legend_handles_labels()[1]) > 1:
        axis.legend(fontsize=8.5)


def _draw_curve(axis: Axes, steps: np.ndarray, values: np.ndarray, line: Line, is_sparse: bool) -> None:
    if not len(steps):
        return
    if is_sparse:
        draw_line(axis, steps, values, line)
        return
    smooth = len(steps) > SMOOTHING_POINTS
    axis.plot(steps, values, color=line.color, alpha=0.25 if smooth else 1.0, lw=1.0 if smooth else 1.8,
              label=None if smooth else line.label)  # fmt: skip
    if smooth:
        axis.plot(steps, _smoothed(values), color=line.color, lw=1.8, label=line.label)


def _read_metrics(path: Path) -> list[dict[str, float]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise UserError(f"{path}: no such file; training writes it with trainer.logger=[file]") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            # A running or killed training leaves half a line at the end, nowhere else.
            if number < len(lines):
                raise UserError(f"{path}:{number}: not valid JSON") from None
    return records


def _series(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(record["step"], record[name]) for record in records if np.isfinite(record.get(name, np.nan))]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a twentieth of the run, shortened at both ends."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


if __name__ == "__main__":
    run_command(command)
