"""Reports as tables, for the console and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from xbai.measure.estimators import Estimate
from xbai.measure.length_bands import LengthBand
from xbai.measure.length_quarters import QUARTERS, LengthQuarter
from xbai.measure.metrics import Comparison, Report
from xbai.measure.strategies import Curves
from xbai.results.settings import search_of

STRATEGY_NAMES = {
    "best_of_n": "Best-of-N",
    "best_of_n_arithmetic": "… by arithmetic mean",
    "best_of_n_product": "… by product",
    "best_of_n_lowest_third": "… by lowest third of the steps",
    "best_of_n_soft_min": "… by soft minimum",
    "best_of_n_min": "… by lowest step",
    "best_of_n_last": "… by last step",
    "best_of_n_combined": "Best-of-N by score and log-prob",
    "best_of_n_log_prob": "Best-of-N by mean log-prob",
    "best_of_n_lowest_window": "… of the least sure steps",
    "best_of_n_tail": "… of the last steps",
    "shortest": "shortest response",
    "majority": "majority vote",
    "weighted_vote": "score-weighted vote",
    "oracle": "oracle (pass@N)",
    "random": "pass@1",
}
CHOICE_NAMES = {
    "best_of_n": "score",
    "best_of_n_combined": "score and log-prob",
    "best_of_n_log_prob": "log-prob",
    "majority": "majority",
    "random": "pass@1",
}
"""Short names of what differences are of."""

MIN_WIDTH = 200


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
    kinds = (accuracy_grid, differences_grid, signals_grid, length_grid, question_length_grid, quality_grid)
    return [grid for grid in (grid_of(reports) for grid_of in kinds) if grid.sections]


def accuracy_grid(reports: Mapping[str, Report]) -> Grid:
    """Accuracy (with its standard error over questions) of each way of choosing at each N."""
    curves = {name: report.curves for name, report in reports.items()}
    return _curves_grid("Accuracy in % ± standard error over questions", curves, STRATEGY_NAMES, percent)


def differences_grid(reports: Mapping[str, Report]) -> Grid:
    """How much better one way of choosing is than another, at each N."""
    title = "Differences of ways to choose in points ± standard error, paired by question"
    differences = {name: report.differences for name, report in reports.items()}
    names = {name: _difference_name(name) for curves in differences.values() for name in curves}
    return _curves_grid(title, differences, names, points)


def _difference_name(name: str) -> str:
    one, other = name.split(" - ")
    other, _, count = other.partition(" at ")
    return f"{CHOICE_NAMES[one]} less {f'the same at N={count}' if count else CHOICE_NAMES[other]}"


def signals_grid(reports: Mapping[str, Report]) -> Grid:
    """How well that by which candidates are chosen tells right from wrong."""
    rows = {
        name: [
            [STRATEGY_NAMES[signal], fraction(found.within_prompt_auc), _number(found.auc, 3)]
            for signal, found in report.signals.items()
        ]
        for name, report in reports.items()
    }
    header = ["", "", "within a question ± standard error", "over all responses"]
    return Grid("AUC: the chance that a right response is ranked above a wrong one", header, _sections(rows), labels=2)


def length_grid(reports: Mapping[str, Report]) -> Grid:
    """How the score does on short, middling and long responses."""
    header = ["", "tokens", "responses (%)", "right (%)", "choices of Best-of-8 (%)", "AUC within a question"]
    rows = {name: [_length_row(band) for band in report.by_length] for name, report in reports.items()}
    return Grid("By length of the response", header, _sections(rows), labels=2)


def _length_row(band: LengthBand) -> list[str]:
    shares = [f"{100 * share:.1f}" for share in (band.share, band.accuracy, band.chosen)]
    return [f"{band.low:,} to {band.high:,}", *shares, fraction(band.within_prompt_auc)]


def question_length_grid(reports: Mapping[str, Report]) -> Grid:
    """Accuracy of each way of choosing on questions with short and long responses."""
    title = "By mean length of the question's responses: accuracy in % ± standard error over questions, of at most 8"
    header = ["", "", "shortest quarter", "second", "third", "longest"]
    rows = {name: _quarter_rows(report.by_question_length) for name, report in reports.items()}
    return Grid(title, header, _sections(rows), labels=2)


def _quarter_rows(quarters: Sequence[LengthQuarter]) -> list[list[str]]:
    if not quarters:
        return []
    rows = [
        ["tokens", *(f"{quarter.low:,.0f} to {quarter.high:,.0f}" for quarter in quarters)],
        ["questions", *(f"{quarter.questions:,}" for quarter in quarters)],
        *(
            [STRATEGY_NAMES[name], *(percent(quarter.accuracies[name]) for quarter in quarters)]
            for name in quarters[0].accuracies
        ),
    ]
    return [row + [""] * (QUARTERS - len(quarters)) for row in rows]


def _sections(rows: Mapping[str, list[list[str]]]) -> list[list[list[str]]]:
    """A section for each set of results that has rows, its name before the first of them."""
    return [
        [[name if number == 0 else "", *row] for number, row in enumerate(section)]
        for name, section in rows.items()
        if section
    ]


def comparison_grid(comparison: Comparison, name: str, base: str) -> Grid:
    """Differences of the accuracies of two sets of results, with their standard errors."""
    paired = f"{comparison.questions:,} questions paired"
    unpaired = f", {comparison.unpaired:,} unpaired" if comparison.unpaired else ""
    other = f"; other {', '.join(comparison.differing_settings)}" if comparison.differing_settings else ""
    title = f"{name} less {base}, in points ± standard error of the difference ({paired}{unpaired}){other}"
    return _curves_grid(title, {name: comparison.curves}, STRATEGY_NAMES, points)


def _curves_grid(
    title: str, curves_of: Mapping[str, Curves], names: Mapping[str, str], cell: Callable[[Estimate], str]
) -> Grid:
    counts = sorted({n for curves in curves_of.values() for curve in curves.values() for n in curve})
    rows = {
        label: [
            [names[name], *(cell(curve[n]) if n in curve else "" for n in counts)] for name, curve in curves.items()
        ]
        for label, curves in curves_of.items()
    }
    return Grid(title, ["", "", *(f"N={n}" for n in counts)], _sections(rows), labels=2)


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
        "AUC within a question": fraction(Estimate(report.within_prompt_auc, report.within_prompt_auc_standard_error)),
        "AUC of the score": _number(report.auc, 3),
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


def percent(estimate: Estimate) -> str:
    """A share with its standard error, in percent."""
    error = "" if np.isnan(estimate.standard_error) else f" ±{100 * estimate.standard_error:.1f}"
    return f"{100 * estimate.mean:.1f}{error}"


def points(estimate: Estimate) -> str:
    """A difference of shares with its sign and standard error, in points."""
    return f"{'+' if estimate.mean >= 0 else ''}{percent(estimate)}"


def fraction(estimate: Estimate) -> str:
    """A value in [0, 1] with its standard error, as words."""
    error = "" if np.isnan(estimate.standard_error) else f" ±{estimate.standard_error:.3f}"
    return f"{_number(estimate.mean, 3)}{error}"


def _number(value: float, digits: int, unit: str = "") -> str:
    return "-" if np.isnan(value) else f"{value:,.{digits}f}{unit}"
