"""`xbai summary`: one JSON file that says what training brought, the model before and after RL side by side.

Where the files have log-probs, it also says what is free (`free_baselines`), so that a score can be held against it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from xbai.calibration import Calibration
from xbai.errors import UserError
from xbai.files import check_writable, write_json
from xbai.measure.figure import check_figure
from xbai.measure.metrics import Report, json_ready, report_files
from xbai.measure.options import SummaryOptions
from xbai.measure.plots import plot_accuracy
from xbai.measure.tables import report_grids, show
from xbai.results.settings import MODELS, differing_settings

MAY_DIFFER = (*MODELS, "lang", "seed")
HELD_OUT_MAY_DIFFER = ("questions", "seed")
SUMMARY_COUNTS = (2, 8, 32)
SUMMARY_STRATEGIES = ("best_of_n", "majority", "oracle", "random", "best_of_n_combined")
FREE_BASELINES = {"mean_log_prob": "best_of_n_log_prob", "shortest": "shortest"}
"""Ways of choosing that need neither a score head nor answers that can be compared."""


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
    named = {"Before RL": base, "After RL": rl, "Before RL, held out": held_out_base, "After RL, held out": held_out}
    reports = {name: report for name, report in named.items() if report is not None}
    write_json(summary, options.output)
    if options.plot_output is not None:
        plot_accuracy(reports, options.plot_output)
    show(report_grids(reports))
    typer.echo(f"wrote {options.output}")


def build_summary(
    base: Report,
    rl: Report,
    seconds_total: float | None = None,
    held_out: Report | None = None,
    held_out_base: Report | None = None,
    score_setting: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The summary of a run; JSON-ready, undefined values are None.

    Args:
        base: results of the model before RL; without scores where it had no head yet.
        rl: results of the model after it, on the same questions with the same sampling.
        seconds_total: wall time of the whole run.
        held_out: results of the model after RL on questions of another kind, with the same sampling.
        held_out_base: of the model before RL on those.
        score_setting: how the score was trained.

    Raises:
        UserError: they were not sampled alike, or with too few samples.
    """
    _check_alike(base, rl, "the two result files", MAY_DIFFER, same_number=True)
    for name, other, of in (("--held_out", held_out, rl), ("--held_out_base", held_out_base, base)):
        if other is not None:
            _check_alike(of, other, f"{name} and the results of the same model", HELD_OUT_MAY_DIFFER)
    if held_out is not None and held_out_base is not None:
        _check_alike(held_out_base, held_out, "--held_out_base and --held_out", MAY_DIFFER, same_number=True)
    return {
        "seconds_total": seconds_total,
        **({} if score_setting is None else {"score_setting": dict(score_setting)}),
        "samples": rl.samples,
        "temperature": (rl.settings or {}).get("temperature"),
        **_both_models(base, rl),
        **({} if held_out is None else {"held_out": _both_models(held_out_base, held_out)}),
    }


def _check_alike(one: Report, other: Report, what: str, may_differ: Sequence[str], same_number: bool = False) -> None:
    settings = one.settings or {}, other.settings or {}
    differing = {
        name: tuple(each.get(name) for each in settings)
        for name in differing_settings(one.settings, other.settings)
        if name not in may_differ
    }
    if same_number and one.questions != other.questions:
        differing["the number of questions"] = one.questions, other.questions
    if differing:
        differences = "; ".join(f"{name} ({first!r}, {second!r})" for name, (first, second) in differing.items())
        raise UserError(f"{what} differ in {differences}: evaluate both alike")


def _both_models(base: Report | None, rl: Report) -> dict[str, Any]:
    """Accuracies on one set of questions, of the model after RL and, where measured, before."""
    reports = {"base": base, "rl": rl} if base is not None else {"rl": rl}
    models = {name: json_ready(report) for name, report in reports.items()}
    at_1 = {name: model["mean_at_1"] for name, model in models.items()}
    return {
        "problems": rl.questions,
        "pass_at_1": {name: estimate["mean"] for name, estimate in at_1.items()},
        "pass_at_1_standard_error": {name: estimate["standard_error"] for name, estimate in at_1.items()},
        **_accuracies(models["rl"]),
        **({} if base is None else {"base_model": _accuracies(models["base"], needs_scores=False)}),
    }


def _accuracies(report: dict[str, Any], needs_scores: bool = True) -> dict[str, Any]:
    curves = report["curves"]
    missing = [n for n in SUMMARY_COUNTS if str(n) not in curves["random"]]
    if missing:
        raise UserError(f"the summary needs N={missing[0]}, but a question has only {report['samples']} samples")
    if needs_scores and "best_of_n" not in curves:
        raise UserError("the summary needs scores: run inference again with scores")
    strategies = [name for name in SUMMARY_STRATEGIES if name in curves]
    has_log_probs = FREE_BASELINES["mean_log_prob"] in curves
    free = {name: curve for name, curve in FREE_BASELINES.items() if has_log_probs and curve in curves}
    free_accuracies = {name: _at_counts(curves[curve], "mean") for name, curve in free.items()}
    errors = {**{name: name for name in strategies}, **free}
    return {
        **{name: _at_counts(curves[name], "mean") for name in strategies},
        **({"free_baselines": free_accuracies} if free else {}),
        "standard_errors": {name: _at_counts(curves[curve], "standard_error") for name, curve in errors.items()},
        "differences": {
            name: {n: value for n, value in curve.items() if int(n) in SUMMARY_COUNTS}
            for name, curve in report["differences"].items()
        },
        "within_prompt_auc": report["within_prompt_auc"],
        "within_prompt_auc_standard_error": report["within_prompt_auc_standard_error"],
        "auc": report["auc"],
        "signals": report["signals"],
    }


def _at_counts(curve: Mapping[str, Any], key: str) -> dict[str, float | None]:
    return {str(n): curve[str(n)][key] for n in SUMMARY_COUNTS}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--score_setting {path}: not a JSON file that can be read ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"--score_setting {path}: holds no JSON object, but {type(value).__name__}")
    return value
