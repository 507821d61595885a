"""`xbai summary`: what it reads, and where it writes what it finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from xbai.calibration import Calibration
from xbai.errors import UserError
from xbai.files import check_writable, write_json
from xbai.measure.figure import check_figure
from xbai.measure.metrics import Report, report_files
from xbai.measure.options import SummaryOptions
from xbai.measure.plots import plot_accuracy
from xbai.measure.summary import build_summary
from xbai.measure.tables import report_grids, show


def run_summary(options: SummaryOptions) -> None:
    """Measure, compare and write.

    Raises:
        UserError: files that are missing, are no results, do not belong together, or were not sampled alike; outputs
            that cannot be written.
    """
    if options.held_out_base is not None and options.held_out is None:
        raise UserError("--held_out_base: there is nothing to compare it with; give --held_out too")
    if options.plot_output is not None:
        check_figure(options.plot_output)
    check_writable(options.output)
    score_setting = None if options.score_setting is None else _read_object(options.score_setting)
    calibration = None if options.calibration is None else Calibration.read(options.calibration)

    def measured(pattern: str, calibration: Calibration | None = None) -> Report:
        return report_files(options.task, [pattern], calibration)[0]

    base, rl = measured(options.base_results), measured(options.rl_results, calibration)
    held_out_base = None if options.held_out_base is None else measured(options.held_out_base)
    held_out = None if options.held_out is None else measured(options.held_out, calibration)
    summary = build_summary(base, rl, options.seconds_total, held_out, held_out_base, score_setting)
    named = {
        "Before RL": base,
        "After RL": rl,
        "Before RL, held out": held_out_base,
        "After RL, held out": held_out,
    }
    reports = {name: report for name, report in named.items() if report is not None}
    write_json(summary, options.output)
    if options.plot_output is not None:
        plot_accuracy(reports, options.plot_output)
    show(report_grids(reports))
    typer.echo(f"wrote {options.output}")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--score_setting {path}: not a JSON file that can be read ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"--score_setting {path}: holds no JSON object, but {type(value).__name__}")
    return value
