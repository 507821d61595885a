"""Figures, drawn from measured results only: accuracy against N, training curves, step scores of right and wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

from xbai.errors import UserError
from xbai.evaluate.metrics import GradedQuestion, Report
from xbai.files import atomic_write

BLUE, ORANGE, GREEN, RED, GREY, LIGHT_GREY = "#1f5fa8", "#d9822b", "#2c8c4b", "#c0392b", "#5f6b76", "#9aa5b1"
CONFIDENCE = 1.96
MIN_SHARE_OF_RESPONSES = 0.02
SMOOTHING_POINTS = 30
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e9ed",
    "axes.edgecolor": LIGHT_GREY,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
}


@dataclass(frozen=True)
class Line:
    """How one curve looks."""

    label: str
    color: str
    dashes: str = "-"
    marker: str | None = "o"


STRATEGY_LINES = {
    "oracle": Line("oracle (any right)", LIGHT_GREY, "--", None),
    "best_of_n": Line("Best-of-N by score", BLUE),
    "majority": Line("majority vote", ORANGE, "-", "s"),
    "random": Line("random pick", GREY, ":", None),
}


@dataclass(frozen=True)
class Panel:
    """One panel of the training figure: metric names (those the run logged are drawn) and how they look."""

    title: str
    lines: Mapping[str, Line]


TRAINING_PANELS = (
    Panel(
        "Pass rate",
        {
            "reward/pass_rate": Line("training samples", BLUE),
            "val/pass@1": Line("validation pass@1", ORANGE),
            "val/best_of_8": Line("validation Best-of-8", GREEN),
        },
    ),
    Panel("Response length (tokens)", {"response_length/mean": Line("mean", BLUE)}),
    Panel("Score AUC", {"score/auc": Line("training samples", BLUE), "val/auc": Line("validation", ORANGE)}),
    Panel(
        "Trajectory score",
        {"score/score_right": Line("right answers", GREEN), "score/score_wrong": Line("wrong answers", RED)},
    ),
    Panel("Policy entropy (nats a token)", {"actor/entropy": Line("entropy", BLUE)}),
    Panel("KL to the reference (nats a token)", {"actor/ref_kl": Line("KL", BLUE)}),
)


def plot_accuracy(reports: Mapping[str, Report], path: Path) -> None:
    """Accuracy against N for each way of choosing, a panel for each report; bands are 95 % confidence."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.0 + 4.4 * len(reports), 4.2))
        axes = figure.subplots(1, len(reports), sharey=True, squeeze=False)
        for panel, (title, report) in zip(axes[0], reports.items()):
            _draw_accuracy(panel, title, report)
        axes[0, 0].set_ylabel("accuracy")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels) if len(reports) > 1 else 2)
        _save(figure, path)


def _draw_accuracy(panel: Axes, title: str, report: Report) -> None:
    for strategy, line in STRATEGY_LINES.items():
        curve = report.curves[strategy]
        counts = np.array(list(curve))
        mean = np.array([estimate.mean for estimate in curve.values()])
        band = CONFIDENCE * np.nan_to_num([estimate.standard_error for estimate in curve.values()])
        _draw(panel, counts, mean, line)
        low, high = np.clip(mean - band, 0, 1), np.clip(mean + band, 0, 1)
        panel.fill_between(counts, low, high, color=line.color, alpha=0.13, lw=0)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.set_xticks(counts)
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panel.set_ylim(top=1.02)
    panel.set_xlabel("candidates N")
    panel.set_title(title)


def plot_training(metrics_file: Path, path: Path) -> None:
    """The curves of a training run, from its `metrics.jsonl`; panels without data are left out.

    Raises:
        UserError: the file is missing, damaged, or holds none of the curves.
    """
    records = _read_metrics(metrics_file)
    panels = [panel for panel in TRAINING_PANELS if any(len(_series(records, name)[0]) for name in panel.lines)]
    if not panels:
        raise UserError(f"{metrics_file}: holds none of the training curves (reward/pass_rate, score/auc, ...)")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.9 * columns, 2.9 * rows))
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis, panel in zip(axes.flat, panels):
            _draw_training(axis, panel, records)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        _save(figure, path)


def _draw_training(axis: Axes, panel: Panel, records: Sequence[Mapping[str, float]]) -> None:
    for name, line in panel.lines.items():
        steps, values = _series(records, name)
        if not len(steps):
            continue
        if name.startswith("val/"):
            _draw(axis, steps, values, line)
            continue
        smooth = len(steps) > SMOOTHING_POINTS
        axis.plot(steps, values, color=line.color, alpha=0.25 if smooth else 1.0, lw=1.0 if smooth else 1.8,
                  label=None if smooth else line.label)  # fmt: skip
        if smooth:
            axis.plot(steps, _smoothed(values), color=line.color, lw=1.8, label=line.label)
    axis.set_title(panel.title)
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if len(axis.get_legend_handles_labels()[1]) > 1:
        axis.legend(fontsize=8.5)


def plot_step_scores(questions: Sequence[GradedQuestion], path: Path) -> None:
    """Mean score of the 1st, 2nd, ... step of right and of wrong responses, as far as enough responses go.

    Raises:
        UserError: the results hold no step scores.
    """
    pairs = [
        (scores, right)
        for question in questions
        for scores, right in zip(question.step_scores, question.correct)
        if scores and not np.isnan(right)
    ]
    if not pairs:
        raise UserError("the results hold no step scores; they come with fused scores or from the score service")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.8))
        axis = figure.subplots()
        for wanted, line in ((1.0, Line("right answers", GREEN)), (0.0, Line("wrong answers", RED))):
            _draw_step_scores(axis, [scores for scores, right in pairs if (right > 0.5) == wanted], line)
        axis.set_ylim(0, 1)
        axis.set_xlabel("step of the response")
        axis.set_ylabel("mean step score")
        axis.set_title("Step scores of right and wrong responses")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend()
        _save(figure, path)


def _draw_step_scores(axis: Axes, responses: Sequence[Sequence[float]], line: Line) -> None:
    if not responses:
        return
    longest = max(map(len, responses))
    padded = np.full((len(responses), longest), np.nan)
    for row, scores in enumerate(responses):
        padded[row, : len(scores)] = scores
    count = (~np.isnan(padded)).sum(0)
    shown = int((count >= max(2, MIN_SHARE_OF_RESPONSES * len(responses))).sum()) or 1
    steps = np.arange(1, shown + 1)
    mean = np.nanmean(padded[:, :shown], axis=0)
    band = CONFIDENCE * np.nanstd(padded[:, :shown], axis=0) / np.sqrt(count[:shown])
    _draw(axis, steps, mean, Line(f"{line.label} ({len(responses):,})", line.color))
    axis.fill_between(steps, mean - band, mean + band, color=line.color, alpha=0.15, lw=0)


def _draw(axis: Axes, x: np.ndarray, y: np.ndarray, line: Line) -> None:
    axis.plot(x, y, line.dashes, color=line.color, marker=line.marker, ms=4, lw=1.8, label=line.label)


def _read_metrics(path: Path) -> list[dict[str, float]]:
    try:
        lines = path.read_text().splitlines()
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


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as stream:
        figure.savefig(stream, dpi=160, format="png", facecolor="white")
