"""Figures of results, drawn from measured numbers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from xbai.measure.estimators import Estimate, clustered_mean
from xbai.measure.figure import (
    BLUE,
    GREEN,
    GREY,
    LIGHT_GREY,
    ORANGE,
    PURPLE,
    RED,
    RIGHT,
    WRONG,
    Line,
    draw_line,
    draw_panels,
    new_figure,
)
from xbai.measure.graded import GradedQuestion
from xbai.measure.metrics import Report
from xbai.results.settings import choice_of

STRATEGY_LINES = {
    "oracle": Line("oracle (any is right)", LIGHT_GREY, "-", None, width=9.0),
    "best_of_n_combined": Line("by score and log-prob", RED, "-.", "^"),
    "best_of_n": Line("Best-of-N", BLUE),
    "best_of_n_log_prob": Line("by mean log-prob", PURPLE, "--", "D"),
    "weighted_vote": Line("score-weighted vote", GREEN, "-", None, width=5.0),
    "majority": Line("majority vote", ORANGE, "-", "s"),
    "random": Line("pass@1", GREY, ":", None),
}
SCALING_LINES = (Line("", BLUE), Line("", PURPLE, "--", "D"))
LABEL_PLACES: tuple[dict[str, Any], ...] = (
    {"xytext": (-5, 4), "ha": "right", "va": "bottom"},
    {"xytext": (5, -5), "ha": "left", "va": "top"},
)
"""Where N stands beside a point of the first and of the second line: rising lines leave these corners free."""

PANEL_SIZE = (4.8, 4.0)
STEP_POSITIONS = np.linspace(0.0, 1.0, 21)


@dataclass(frozen=True)
class StepCurve:
    """Mean step score [points] at `STEP_POSITIONS`, from the first step of a response to its last.

    Attributes:
        standard_error: [points] over questions (nan with one).
        responses: how many were averaged.
    """

    mean: np.ndarray
    standard_error: np.ndarray
    responses: int


def plot_results(reports: Mapping[str, Report], questions: Sequence[GradedQuestion], path: Path) -> None:
    """One figure of everything: accuracy against N and against tokens, step scores, reliability.

    Panels for which the results have no data are left out. Of the reports, the first is drawn, whose candidates are
    `questions`, and in the panel of tokens also the base that it is compared with.
    """
    report = next(iter(reports.values()))
    curves = [(line, curve) for line in (RIGHT, WRONG) if (curve := step_curve(questions, right=line is RIGHT))]
    panels: list[Callable[[Axes], None]] = [lambda axis: _draw_accuracy(axis, report)]
    if any(_has_tokens(each) for each in reports.values()):
        panels.append(lambda axis: _draw_scaling(axis, reports))
    if curves:
        panels.append(lambda axis: _draw_step_curves(axis, curves))
    if report.reliability:
        panels.append(lambda axis: _draw_reliability(axis, report))
    first, *others = reports
    title = f"{first}; in the panel of thinking tokens also {', '.join(others)}" if others else ""
    draw_panels(path, panels, 2, PANEL_SIZE, title)


def plot_accuracy(reports: Mapping[str, Report], path: Path) -> None:
    """Accuracy against N for each way of choosing, a panel for each report; bands are 95 % confidence."""
    with new_figure(path, 1.0 + 4.4 * len(reports), 4.2) as figure:
        axes = figure.subplots(1, len(reports), sharey=True, squeeze=False)[0]
        for axis, (title, report) in zip(axes, reports.items(), strict=True):
            _draw_accuracy_lines(axis, title, report)
        # Only once all are drawn: they share the axis.
        accuracy_axis(axes[0])
        drawn = {
            label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        labels = [line.label for line in STRATEGY_LINES.values() if line.label in drawn]
        handles = [drawn[label] for label in labels]
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels) if len(reports) > 1 else 2)


def _draw_accuracy(axis: Axes, report: Report) -> None:
    _draw_accuracy_lines(axis, "Accuracy against candidates", report)
    accuracy_axis(axis)
    _legend_below(axis, columns=2)


def _draw_accuracy_lines(axis: Axes, title: str, report: Report) -> None:
    for strategy, line in STRATEGY_LINES.items():
        if strategy in report.curves:
            counts, mean, error = _columns(report.curves[strategy])
            draw_line(axis, counts, mean, line, None if strategy == "random" else error)
    ticks = list(report.curves["random"])
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(title=title, xlabel="candidates N")


def _draw_scaling(axis: Axes, reports: Mapping[str, Report]) -> None:
    # There are more of both than reports.
    for (name, report), line, place in zip(reports.items(), SCALING_LINES, LABEL_PLACES, strict=False):
        if not _has_tokens(report):
            continue
        strategy = _own_strategy(report)
        counts, mean, error = _columns(report.curves[strategy])
        tokens = counts * report.lengths.mean
        label = STRATEGY_LINES[strategy].label
        label = f"{name}: {label}" if len(reports) > 1 else label
        draw_line(axis, tokens, mean, Line(label, line.color, line.dashes, line.marker), error)
        for count, x, y in zip(counts, tokens, mean, strict=True):
            axis.annotate(f"{count:,.0f}", (x, y), textcoords="offset points", fontsize=8, color=line.color, **place)
    token_axis(axis)
    accuracy_axis(axis, headroom=0.05)
    title = "Accuracy against thinking tokens, with N"
    axis.set(title=title, xlabel="thinking tokens a question, N candidates together")
    _legend_below(axis, columns=1)


def _draw_step_curves(axis: Axes, curves: Sequence[tuple[Line, StepCurve]]) -> None:
    for line, curve in curves:
        labelled = Line(f"{line.label} ({curve.responses:,})", line.color, line.dashes, None)
        draw_line(axis, STEP_POSITIONS, curve.mean, labelled, curve.standard_error)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set(xlim=(0, 1), xlabel="position in the response, from first step to last")
    axis.set(ylim=(0, 1), ylabel="mean step score", title="Step scores of right and wrong responses")
    _legend_below(axis, columns=2)


def _draw_reliability(axis: Axes, report: Report) -> None:
    low, high, count, score, accuracy, error = np.array([astuple(bin) for bin in report.reliability]).T
    axis.bar(low, count / count.sum(), high - low, align="edge", color=LIGHT_GREY, alpha=0.35, lw=0,
             label="share of responses")  # fmt: skip
    axis.plot([0, 1], [0, 1], ":", color=GREY, lw=1.2, label="ideal")
    draw_line(axis, score, accuracy, Line("accuracy", BLUE), error)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set(xlim=(0, 1), xlabel="score of a response", ylim=(0, 1.02), ylabel="accuracy, and share of responses")
    axis.set_title(f"Reliability (calibration error {report.calibration_error:.3f})")
    _legend_below(axis, columns=3)


def step_curve(questions: Sequence[GradedQuestion], right: bool) -> StepCurve | None:
    """The curve of the right, or of the wrong, responses that have steps; None where there are none.

    Each response is stretched to the same length, so that long ones weigh no more than short ones: between steps lie
    straight lines, a single step is everywhere.
    """
    chosen = [
        (np.interp(STEP_POSITIONS, np.linspace(0.0, 1.0, len(steps)) if len(steps) > 1 else [0.0], steps), number)
        for number, question in enumerate(questions)
        for steps, correct in zip(question.step_scores, question.correct, strict=True)
        if steps and not np.isnan(correct) and (correct > 0.5) == right
    ]
    if not chosen:
        return None
    rows, numbers = zip(*chosen, strict=True)
    return StepCurve(*clustered_mean(np.stack(rows), np.array(numbers)), len(rows))


def _columns(curve: Mapping[int, Estimate]) -> np.ndarray:
    """N, mean and standard error, [3, counts]."""
    return np.array([(n, estimate.mean, estimate.standard_error) for n, estimate in curve.items()]).T


def _legend_below(axis: Axes, columns: int) -> None:
    # Inside, it would cover a line sooner or later.
    axis.legend(loc="upper left", bbox_to_anchor=(-0.03, -0.17), ncols=columns, columnspacing=1.2, handlelength=2.2)


def _own_strategy(report: Report) -> str:
    """The choice that the results were made for, or the next best that they allow."""
    wanted = (choice_of(report.settings), "majority", "random")
    return next(strategy for strategy in wanted if strategy in report.curves)


def _has_tokens(report: Report) -> bool:
    return not np.isnan(report.lengths.mean)


def token_axis(axis: Axes) -> None:
    """A logarithmic axis of tokens, once all is drawn."""
    axis.set_xscale("log")
    axis.margins(x=0.08)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda count, _: _short(count)))
    axis.xaxis.set_minor_locator(NullLocator())


def accuracy_axis(axis: Axes, headroom: float = 0.02) -> None:
    """An axis of accuracies, once all is drawn; `headroom` above is a share of the height."""
    bottom, top = axis.get_ylim()
    top = min(1.0, top)
    axis.set_ylim(bottom, top + headroom * (top - bottom))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=(1, 2, 5, 10)))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_ylabel("accuracy")


def _short(count: float) -> str:
    """1234 as 1.2k."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"
