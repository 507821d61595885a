"""Reports as tables, for the console and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from xbai.evaluate.metrics import Comparison, Curves, Estimate, Report
from xbai.evaluate.settings import search_of

STRATEGY_NAMES = {
    "best_of_n": "Best-of-N",
    "best_of_n_arithmetic": "… by arithmetic mean",
    "best_of_n_product": "… by product",
    "best_of_n_min": "… by lowest step",
    "best_of_n_last": "… by last step",
    "majority": "majority vote",
    "weighted_vote": "score-weighted vote",
    "oracle": "oracle (pass@N)",
    "random": "pass@1",
}
MIN_WIDTH = 120


@dataclass(frozen=True)
class Grid:
    """A table before it takes a form: the first `labels` columns are words, the others numbers.

    Attributes:
        title: what the numbers are.
        header: names of the columns.
        sections: rows, in groups that a line sets apart.
        labels: how many columns are words.
    """

    title: str
    header: list[str]
    sections: list[list[list[str]]]
    labels: int

    def to_rich(self) -> Table:
        """For the console, without the title, which rich would break at the width of the table."""
        table = Table(box=box.SIMPLE_HEAD)
        for number, name in enumerate(self.header):
            table.add_column(name, justify="left" if number < self.labels else "right", no_wrap=True)
        for section in self.sections:
            for row in section:
                table.add_row(*row)
            table.add_section()
        return table

    def to_markdown(self) -> str:
        """As a GitHub table under its title."""
        rule = [":--" if number < self.labels else "--:" for number in range(len(self.header))]
        rows = [self.header, rule, *(row for section in self.sections for row in section)]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        return f"**{self.title}**\n\n" + "\n".join(lines) + "\n"


def show(grids: Sequence[Grid]) -> None:
    """Print tables on the console."""
    console = Console()
    # Where there is no terminal, rich assumes 80 columns and would cut the cells.
    console.width = max(console.width, MIN_WIDTH)
    for grid in grids:
        console.print(grid.title, style="bold", highlight=False)
        console.print(grid.to_rich())


def report_grids(reports: Mapping[str, Report]) -> list[Grid]:
    """Everything measured on each named set of results."""
    return [accuracy_grid(reports), quality_grid(reports)]


def accuracy_grid(reports: Mapping[str, Report]) -> Grid:
    """Accuracy (with its standard error over questions) of each way of choosing at each N."""
    curves = {name: report.curves for name, report in reports.items()}
    return _curves_grid("Accuracy in % ± standard error over questions", curves, _percent)


def comparison_grid(comparison: Comparison, name: str, base: str) -> Grid:
    """Differences of the accuracies of two sets of results, with their standard errors."""
    title = (
        f"{name} less {base}, in points ± standard error of the difference ({comparison.questions:,} questions paired"
    )
    title += f", {comparison.unpaired:,} unpaired)" if comparison.unpaired else ")"
    if comparison.differing_settings:
        title += f"; other {', '.join(comparison.differing_settings)}"
    return _curves_grid(title, {name: comparison.curves}, _points)


def _curves_grid(title: str, curves_of: Mapping[str, Curves], cell: Callable[[Estimate], str]) -> Grid:
    counts = sorted({n for curves in curves_of.values() for n in curves["random"]})
    sections = []
    for name, curves in curves_of.items():
        names = [name] + [""] * (len(curves) - 1)
        sections.append(
            [
                [first, STRATEGY_NAMES[strategy], *(cell(curve[n]) if n in curve else "" for n in counts)]
                for first, (strategy, curve) in zip(names, curves.items())
            ]
        )
    return Grid(title, ["", "", *(f"N={n}" for n in counts)], sections, labels=2)


def quality_grid(reports: Mapping[str, Report]) -> Grid:
    """What else there is to know about each set of results."""
    columns = [_quality(report) for report in reports.values()]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return Grid("Scores and responses", ["", *reports], [rows], labels=1)


def _quality(report: Report) -> dict[str, str]:
    percentiles = {f"tokens, {p}th percentile": _number(v, 0) for p, v in report.lengths.percentiles.items()}
    return {
        "questions": f"{report.questions:,}",
        "samples of each": f"{report.samples:,}",
        "search": _search(report),
        "AUC of the score": _number(report.auc, 3),
        "AUC within a question": _number(report.within_prompt_auc, 3),
        "calibration error": _number(report.calibration_error, 3),
        "tokens, mean": _number(report.lengths.mean, 1),
        **percentiles,
        "tokens of right responses": _number(report.lengths.right, 1),
        "tokens of wrong responses": _number(report.lengths.wrong, 1),
        "truncated": _number(100 * report.truncated_rate, 1, " %"),
        "ungraded": f"{report.ungraded:,} ({100 * report.ungraded_rate:.1f} %)",
        "without a score": f"{report.unscored:,}",
        "refused by the service": f"{report.refused:,}",
        "missing samples": f"{report.missing:,}",
        "questions without a sample (wrong)": f"{report.unanswered:,}",
    }


def _search(report: Report) -> str:
    search = search_of(report.settings)
    name = search.pop("name")
    details = ", ".join(f"{key} {value}" for key, value in search.items() if value is not None)
    return f"{name} ({details})" if details else name


def _percent(estimate: Estimate) -> str:
    error = "" if np.isnan(estimate.standard_error) else f" ±{100 * estimate.standard_error:.1f}"
    return f"{100 * estimate.mean:.1f}{error}"


def _points(estimate: Estimate) -> str:
    return f"{'+' if estimate.mean >= 0 else ''}{_percent(estimate)}"


def _number(value: float, digits: int, unit: str = "") -> str:
    return "-" if np.isnan(value) else f"{value:,.{digits}f}{unit}"
