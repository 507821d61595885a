"""`xbai replay`: what rules of a budget would have brought, as tables, JSON and a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xbai.calibration import Calibration
from xbai.errors import UserError
from xbai.measure.estimators import Estimate
from xbai.measure.figure import check_figure
from xbai.measure.graded import grade_lines
from xbai.measure.metric_command import TERMINAL, check_outputs, write_output
from xbai.measure.metrics import json_ready
from xbai.measure.options import ReplayOptions
from xbai.measure.replay_families import SCORELESS
from xbai.measure.replay_fit import Fitted, Point, Replay, Run
from xbai.measure.replay_plot import Curve, plot_replay
from xbai.measure.replay_questions import check_replayable
from xbai.measure.result_set import read_lines, result_files
from xbai.measure.tables import Grid, percent, points, show
from xbai.results.settings import check_calibration
from xbai.search.budget import parse_budget
from xbai.search.rule import Rule

SIGNAL_NAMES = {"score": "score", "log_prob": "mean log-prob", "last_step": "last step's score"}
FittedRules = dict[str, dict[str, Fitted]]
"""By kind and signal."""


@dataclass(frozen=True)
class Replayed:
    """One rule as it is, on all questions.

    Attributes:
        begun: candidates a question.
        pruned: which share of them was given up.
    """

    rule: str
    point: Point
    begun: float
    pruned: float


def run_replay(options: ReplayOptions) -> None:
    """Replay and write everything that is asked for.

    Raises:
        UserError: rules or files that are none, samples that cannot be replayed, outputs that cannot be written.
    """
    if options.plot_path is not None:
        check_figure(options.plot_path)
    check_outputs(options.json_path, options.markdown_path)
    rules = [parse_budget(text) for text in options.budget]
    if options.calibration is not None and not rules:
        raise UserError("--calibration: gives chances to the rules of --budget, of which there are none")
    calibration = None if options.calibration is None else Calibration.read(options.calibration)
    lines, place = read_lines(result_files(options.results, "RESULTS"), options.task), " ".join(options.results)
    settings = next((line.settings for line in lines if line.settings is not None), None)
    if calibration is not None:
        check_calibration(calibration, settings, place)
    questions = grade_lines(options.task, lines)
    check_replayable(questions, options.n, place)
    replay = Replay(questions, options.n)
    given = [_replayed(replay, rule, calibration) for rule in rules]
    runs = {target: replay.runs(target) for target in replay.targets}
    fitted = {target: _fitted(replay, runs[target], target, options.tolerance / 100) for target in runs}
    best_of_n = {n: Point.of(each.correct, each.tokens) for n, each in replay.best_of_n.items()}
    curves = [Curve.of(run, fitted[options.n][run.family.kind][run.family.signal].rule) for run in runs[options.n]]
    grids = [_best_of_n_grid(best_of_n, len(questions)), *(_fitted_grid(fitted[n], best_of_n[n], n) for n in fitted)]
    grids += [_given_grid(given)] if given else []
    if TERMINAL not in (options.json_path, options.markdown_path):
        show(grids)
    values: dict[str, Any] = {
        "questions": len(questions),
        "n": options.n,
        "tolerance": options.tolerance,
        "best_of_n": best_of_n,
        "fitted": fitted,
        "budget": given,
        "curves": curves,
    }
    write_output(options.json_path, json.dumps(json_ready(values), indent=2))
    write_output(options.markdown_path, "\n".join(map(Grid.to_markdown, grids)))
    if options.plot_path is not None:
        plot_replay(best_of_n, curves, options.plot_path)


def _replayed(replay: Replay, rule: Rule, calibration: Calibration | None) -> Replayed:
    outcomes = replay.held_out(rule, None if calibration is None else calibration.chance)
    point = Point.of(outcomes.correct, outcomes.tokens)
    begun = outcomes.begun.mean()
    return Replayed(str(rule), point, float(begun), float(outcomes.pruned.mean() / begun))


def _fitted(replay: Replay, runs: Sequence[Run], target: int, tolerance: float) -> FittedRules:
    found: FittedRules = {}
    for run in runs:
        found.setdefault(run.family.kind, {})[run.family.signal] = replay.fit(run, target, tolerance)
    return found


def _best_of_n_grid(best_of_n: Mapping[int, Point], questions: int) -> Grid:
    rows = [[f"Best-of-{n}", percent(point.accuracy), _tokens(point.tokens)] for n, point in best_of_n.items()]
    title = f"Best-of-N by score, its expectation over the order of the samples, {questions:,} questions"
    return Grid(title, ["", "accuracy (%) ± standard error", "tokens a question"], [rows], 1)


def _fitted_grid(fitted: FittedRules, baseline: Point, n: int) -> Grid:
    sections = [
        [
            [
                kind,
                "" if kind in SCORELESS else SIGNAL_NAMES[signal],
                each.rule,
                percent(each.point.accuracy),
                points(each.difference),
                _tokens(each.point.tokens),
                f"{100 * each.share:.0f}",
            ]
            for signal, each in by_signal.items()
        ]
        for kind, by_signal in fitted.items()
    ]
    title = (
        f"To reach Best-of-{n} ({percent(baseline.accuracy)} % with {_tokens(baseline.tokens)} tokens) among {n} "
        "candidates: chosen on one half of the questions, measured on the other, both ways"
    )
    header = ["", "by", "rule (chosen on all)", "accuracy (%)", f"less Best-of-{n}", "tokens a question", "share (%)"]
    return Grid(title, header, sections, 3)


def _given_grid(given: Sequence[Replayed]) -> Grid:
    rows = [
        [
            each.rule,
            percent(each.point.accuracy),
            _tokens(each.point.tokens),
            f"{each.begun:.1f}",
            f"{100 * each.pruned:.0f}",
        ]
        for each in given
    ]
    header = ["rule", "accuracy (%) ± standard error", "tokens a question", "candidates", "of them pruned (%)"]
    return Grid("Rules as they are", header, [rows], 1)


def _tokens(estimate: Estimate) -> str:
    return f"{estimate.mean:,.0f}"
