"""Accuracy against tokens: a fixed number of candidates, and rules that decide it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from xbai.measure.figure import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, Line, draw_line, new_figure
from xbai.measure.plots import LABEL_PLACES, accuracy_axis, token_axis
from xbai.measure.replay_fit import Point, Run

FIXED = Line("Best-of-N", BLUE, width=2.4)
LINES = {
    ("stop", "score"): Line("stop, by score", ORANGE, marker=None),
    ("stop", "log_prob"): Line("stop, by mean log-prob", PURPLE, "--", None),
    ("posterior", "score"): Line("posterior, by score", GREEN, marker=None),
    ("prune+stop", "score"): Line("prune and stop, by score", RED, marker=None, width=2.4),
    ("majority", "score"): Line("majority, without a score", GREY, ":", None),
}
"""The families that are drawn."""

BANDED = ("prune+stop", "score")
"""The one among them that is drawn with its band: more would cover each other."""

SIZE = (6.4, 4.8)


@dataclass(frozen=True)
class Curve:
    """A family's rules that differ in their threshold alone, with chances fitted on the half without the question."""

    kind: str
    signal: str
    rules: list[str]
    points: list[Point]

    @classmethod
    def of(cls, run: Run, rule: str) -> Curve:
        """That of the rules like this one."""
        numbers = run.other.line_of(rule)
        points = [Point.of(run.other.correct[number], run.other.tokens[number]) for number in numbers]
        return cls(run.family.kind, run.family.signal, [run.other.rules[number] for number in numbers], points)


def plot_replay(best_of_n: Mapping[int, Point], curves: Sequence[Curve], path: Path) -> None:
    """Write the figure; bands are 95 % confidence."""
    with new_figure(path, *SIZE) as figure:
        axis = figure.subplots()
        tokens = _draw(axis, FIXED, list(best_of_n.values()), banded=True)
        for n, x, point in zip(best_of_n, tokens, best_of_n.values(), strict=True):
            axis.annotate(f"N={n}", (x, point.accuracy.mean), textcoords="offset points", fontsize=8, color=FIXED.color,
                          **LABEL_PLACES[1])  # fmt: skip
        for curve in curves:
            if line := LINES.get((curve.kind, curve.signal)):
                _draw(axis, line, curve.points, banded=(curve.kind, curve.signal) == BANDED)
        token_axis(axis)
        accuracy_axis(axis)
        axis.set(title="Accuracy against tokens", xlabel="tokens a question, all candidates together")
        figure.legend(loc="outside lower center", ncols=3)


def _draw(axis: Axes, line: Line, points: Sequence[Point], banded: bool) -> np.ndarray:
    tokens, accuracy, error = np.array(
        [(point.tokens.mean, point.accuracy.mean, point.accuracy.standard_error) for point in points]
    ).T
    draw_line(axis, tokens, accuracy, line, error if banded else None)
    return tokens
