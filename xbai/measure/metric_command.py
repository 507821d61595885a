"""`xbai metric`: what it measures, and where it writes that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from xbai.calibration import Calibration
from xbai.errors import UserError
from xbai.files import atomic_write, check_writable
from xbai.measure.budget_report import budget_of_files, report_budget
from xbai.measure.figure import check_figure
from xbai.measure.graded import GradedQuestion
from xbai.measure.metrics import compare, json_ready, repeated_accuracy, report_files
from xbai.measure.options import MetricOptions
from xbai.measure.plots import plot_results
from xbai.measure.tables import STRATEGY_NAMES, Grid, comparison_grid, report_grids, show
from xbai.results.run_budget import RunBudget
from xbai.results.settings import choice_of

TERMINAL = Path("-")


@dataclass(frozen=True)
class RepeatedTest:
    """Best-of-N, or the vote that the run asked for, on every disjoint group of N candidates."""

    strategy: str
    n: int
    repetitions: int
    accuracies: list[float]
    mean: float

    @classmethod
    def of(cls, questions: Sequence[GradedQuestion], strategy: str, n: int) -> RepeatedTest:
        """Raises `UserError` as `repeated_accuracy` does."""
        accuracies = repeated_accuracy(questions, n, strategy)
        return cls(strategy, n, len(accuracies), accuracies, sum(accuracies) / len(accuracies))

    @property
    def lines(self) -> list[str]:
        """As it is said."""
        name = f"Best-of-{self.n}" if self.strategy == "best_of_n" else f"{STRATEGY_NAMES[self.strategy]} of {self.n}"
        return [f"Test {self.repetitions} times", f"pass@1 ({name}): {100 * self.mean:.2f}"]


def run_metric(options: MetricOptions) -> None:
    """Measure and write everything that is asked for.

    Raises:
        UserError: files that are missing, are no results or do not belong together; too few samples for N; outputs
            that cannot be written.
    """
    if options.plot_path is not None:
        check_figure(options.plot_path)
    check_outputs(options.json_path, options.markdown_path)
    if (budget := budget_of_files(options.patterns)) is not None:
        _run_with_budget(options, budget)
        return
    calibration = None if options.calibration is None else Calibration.read(options.calibration)
    report, questions = report_files(options.task, options.patterns, calibration)
    repeated = RepeatedTest.of(questions, choice_of(report.settings), options.n)
    name, base_name = _names(options)
    reports = {name: report}
    compared: list[Grid] = []
    values: dict[str, Any] = {"repeated": repeated, **vars(report)}
    if options.compare:
        base, base_questions = report_files(options.task, options.compare)
        comparison = compare(questions, base_questions, (report.settings, base.settings))
        reports[base_name] = base
        compared = [comparison_grid(comparison, name, base_name)]
        values |= {"base": base, "difference": comparison}
    grids = [*report_grids(reports), *compared]
    if TERMINAL not in (options.json_path, options.markdown_path):
        typer.echo("\n".join(repeated.lines))
        show(grids)
    write_output(options.json_path, json.dumps(json_ready(values), indent=2))
    write_output(options.markdown_path, "\n".join(["  \n".join(repeated.lines) + "\n", *map(Grid.to_markdown, grids)]))
    if options.plot_path is not None:
        plot_results(reports, questions, options.plot_path)


def _run_with_budget(options: MetricOptions, budget: RunBudget) -> None:
    for option, value in (
        ("compare", options.compare),
        ("plot", options.plot_path),
        ("calibration", options.calibration),
    ):
        if value:
            raise UserError(
                f"--{option}: {options.patterns[0]} was sampled with {budget.options}; xbai replay "
                "compares budgets on results without one"
            )
    if options.n not in (1, budget.candidates):
        raise UserError(f"--N {options.n}: {options.patterns[0]} has groups of {budget.candidates} candidates at most")
    report = report_budget(options.task, options.patterns, budget)
    if TERMINAL not in (options.json_path, options.markdown_path):
        show([report.grid])
    write_output(options.json_path, json.dumps(json_ready(report), indent=2))
    write_output(options.markdown_path, report.grid.to_markdown())


def _names(options: MetricOptions) -> tuple[str, str]:
    """Short names of the two sets of results: the file's, where that tells them apart, else the whole path."""
    if not options.compare:
        return options.task, ""
    paths = Path(options.patterns[0]), Path(options.compare[0])
    stems = paths[0].stem, paths[1].stem
    return stems if stems[0] != stems[1] else (str(paths[0]), str(paths[1]))


def check_outputs(*paths: Path | None) -> None:
    """Refuse what `write_output` could not write (call it before the work); raises `UserError`."""
    for path in paths:
        if path is not None and path != TERMINAL:
            check_writable(path)


def write_output(path: Path | None, text: str) -> None:
    """Where there is a path; `-` is the terminal."""
    if path == TERMINAL:
        typer.echo(text)
    elif path is not None:
        with atomic_write(path, "w") as stream:
            stream.write(text.removesuffix("\n") + "\n")
