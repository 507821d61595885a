"""`xbai metric`: what it measures, and where it writes that."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from xbai.calibration import Calibration
from xbai.files import atomic_write, check_writable, write_json
from xbai.measure.figure import check_figure
from xbai.measure.metrics import Comparison, Report, compare, repeated_accuracy, report_files
from xbai.measure.options import MetricOptions
from xbai.measure.plots import plot_results
from xbai.measure.tables import STRATEGY_NAMES, Grid, comparison_grid, report_grids, show
from xbai.results.settings import choice_of

TERMINAL = Path("-")


@dataclass(frozen=True)
class RepeatedTest:
    """Best-of-N, or the vote that the run asked for, on every disjoint group of N candidates."""

    strategy: str
    n: int
    accuracies: list[float]

    @property
    def mean(self) -> float:
        """Mean over the repetitions."""
        return sum(self.accuracies) / len(self.accuracies)

    @property
    def lines(self) -> list[str]:
        """As it is said."""
        name = f"Best-of-{self.n}" if self.strategy == "best_of_n" else f"{STRATEGY_NAMES[self.strategy]} of {self.n}"
        return [f"Test {len(self.accuracies)} times", f"pass@1 ({name}): {100 * self.mean:.2f}"]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "strategy": self.strategy,
            "n": self.n,
            "repetitions": len(self.accuracies),
            "accuracies": self.accuracies,
            "mean": self.mean,
        }


def run_metric(options: MetricOptions) -> None:
    """Measure and write everything that is asked for.

    Raises:
        UserError: files that are missing, are no results or do not belong together; too few samples for N; outputs
            that cannot be written.
    """
    if options.plot_path is not None:
        check_figure(options.plot_path)
    for path in (options.json_path, options.markdown_path):
        if path not in (None, TERMINAL):
            check_writable(path)
    calibration = None if options.calibration is None else Calibration.read(options.calibration)
    report, questions = report_files(options.task, options.patterns, calibration)
    strategy = choice_of(report.settings)
    repeated = RepeatedTest(strategy, options.n, repeated_accuracy(questions, options.n, strategy))
    name, base_name = _names(options)
    reports, comparison = {name: report}, None
    if options.compare:
        base, base_questions = report_files(options.task, options.compare)
        reports[base_name] = base
        comparison = compare(questions, base_questions, (report.settings, base.settings))
    grids = report_grids(reports)
    if comparison is not None:
        grids.append(comparison_grid(comparison, name, base_name))
    if TERMINAL not in (options.json_path, options.markdown_path):
        typer.echo("\n".join(repeated.lines))
        show(grids)
    _write_json(options.json_path, repeated, reports, comparison)
    _write_markdown(options.markdown_path, repeated, grids)
    if options.plot_path is not None:
        plot_results(reports, questions, options.plot_path)


def _names(options: MetricOptions) -> tuple[str, str]:
    """Short names of the two sets of results: the file's, where that tells them apart, else the whole path."""
    if not options.compare:
        return options.task, ""
    paths = Path(options.patterns[0]), Path(options.compare[0])
    stems = paths[0].stem, paths[1].stem
    return stems if stems[0] != stems[1] else (str(paths[0]), str(paths[1]))


def _write_json(
    path: Path | None, repeated: RepeatedTest, reports: dict[str, Report], comparison: Comparison | None
) -> None:
    if path is None:
        return
    report, *base = reports.values()
    values = {"repeated": repeated.to_dict(), **report.to_dict()}
    if comparison is not None:
        values |= {"base": base[0].to_dict(), "difference": comparison.to_dict()}
    if path == TERMINAL:
        json.dump(values, sys.stdout, indent=2)
        typer.echo()
    else:
        write_json(values, path)


def _write_markdown(path: Path | None, repeated: RepeatedTest, grids: Sequence[Grid]) -> None:
    if path is None:
        return
    text = "\n".join(["  \n".join(repeated.lines) + "\n", *(grid.to_markdown() for grid in grids)])
    if path == TERMINAL:
        typer.echo(text)
    else:
        with atomic_write(path, "w") as stream:
            stream.write(text)
