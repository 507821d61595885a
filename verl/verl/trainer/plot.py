"""The figure of a training run, from the metrics it logged: `python -m verl.trainer.plot`, `xbai plot training`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from xbai.cli import as_command, run_command
from xbai.errors import UserError
from xbai.measure.figure import BLUE, GREEN, ORANGE, PURPLE, RIGHT, WRONG, Line, draw_line, draw_panels

SMOOTHING_POINTS = 30
PANEL_SIZE = (3.9, 2.9)


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
class PlotOptions:
    """Which curves to draw, and where."""

    metrics_file: Path
    """metrics.jsonl of a training."""
    output: Path
    """The figure to write: .png, .pdf or .svg."""


def plot(options: PlotOptions) -> None:
    """Draw a training's curves."""
    plot_training(options.metrics_file, options.output)
    typer.echo(f"wrote {options.output}")


command = as_command(plot, PlotOptions)


def plot_training(metrics_file: Path, path: Path, unit: str = "step") -> None:
    """The curves of a training run, from its `metrics.jsonl`, by `unit`; panels without data are left out.

    Raises:
        UserError: the file is missing, damaged, or holds none of the curves.
    """
    records = _read_metrics(metrics_file)
    panels = [panel for panel in TRAINING_PANELS if any(len(_series(records, name)[0]) for name in panel.lines)]
    if not panels:
        raise UserError(f"{metrics_file}: holds none of the training curves (reward/pass_rate, score/auc, ...)")
    drawings = [partial(_draw_training, panel=panel, records=records, unit=unit) for panel in panels]
    draw_panels(path, drawings, columns=3, size=PANEL_SIZE)


def _draw_training(axis: Axes, panel: Panel, records: Sequence[Mapping[str, float]], unit: str) -> None:
    for name, line in panel.lines.items():
        steps, values = _series(records, name)
        if not len(steps):
            continue
        if name.startswith("val/"):
            draw_line(axis, steps, values, line)
            continue
        smooth = len(steps) > SMOOTHING_POINTS
        axis.plot(steps, values, color=line.color, alpha=0.25 if smooth else 1.0, lw=1.0 if smooth else 1.8,
                  label=None if smooth else line.label)  # fmt: skip
        if smooth:
            axis.plot(steps, _smoothed(values), color=line.color, lw=1.8, label=line.label)
    axis.set_title(panel.title)
    axis.set_xlabel(unit)
    if panel.percent:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if len(axis.get_legend_handles_labels()[1]) > 1:
        axis.legend(fontsize=8.5)


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


def _series(records: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
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
