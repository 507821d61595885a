"""Reports as tables on the console."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from xbai.evaluate.metrics import Estimate, Report

STRATEGY_NAMES = {
    "best_of_n": "Best-of-N",
    "majority": "majority vote",
    "weighted_vote": "score-weighted vote",
    "oracle": "oracle",
    "random": "random pick",
}
MIN_WIDTH = 120


def show(reports: Mapping[str, Report]) -> None:
    """Print everything measured on each named set of results."""
    console = Console()
    # Where there is no terminal, rich assumes 80 columns and would cut the cells.
    console.width = max(console.width, MIN_WIDTH)
    console.print(accuracy_table(reports), quality_table(reports))


def accuracy_table(reports: Mapping[str, Report]) -> Table:
    """Accuracy (with its standard error over questions) of each way of choosing at each N."""
    counts = sorted({n for report in reports.values() for n in report.curves["random"]})
    table = _table("Accuracy in % ± standard error over questions", ["", ""], [f"N={n}" for n in counts])
    for name, report in reports.items():
        for row, (strategy, label) in enumerate(STRATEGY_NAMES.items()):
            curve = report.curves[strategy]
            cells = (_percent(curve[n]) if n in curve else "" for n in counts)
            table.add_row("" if row else name, label, *cells)
        table.add_section()
    return table


def quality_table(reports: Mapping[str, Report]) -> Table:
    """What else there is to know about each set of results."""
    columns = ["questions", "samples", "AUC", "in prompt", "tokens", "truncated", "ungraded", "unscored"]
    table = _table("Scores and responses", [""], columns)
    for name, report in reports.items():
        table.add_row(
            name,
            str(report.questions),
            str(report.samples),
            _number(report.auc, 3),
            _number(report.within_prompt_auc, 3),
            _number(report.mean_tokens, 1),
            f"{100 * report.truncated_rate:.1f} %",
            str(report.ungraded),
            str(report.unscored),
        )
    return table


def _table(title: str, labels: list[str], numbers: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for label in labels:
        table.add_column(label, no_wrap=True)
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table


def _percent(estimate: Estimate) -> str:
    error = "" if np.isnan(estimate.standard_error) else f" ±{100 * estimate.standard_error:.1f}"
    return f"{100 * estimate.mean:.1f}{error}"


def _number(value: float, digits: int) -> str:
    return "-" if np.isnan(value) else f"{value:.{digits}f}"
