"""What all figures share: typography, colours that colour-blind readers tell apart, lines with bands, and files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from xbai.errors import UserError
from xbai.files import atomic_write, check_writable

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

# The palette of Okabe and Ito, blue and green a little darker.
BLUE, ORANGE, GREEN, RED, PURPLE = "#0067a5", "#e69f00", "#00876a", "#d55e00", "#a8558a"
GREY, LIGHT_GREY = "#4d5761", "#9aa5b1"
CONFIDENCE = 1.96
FORMATS = (".png", ".pdf", ".svg")
DOTS_PER_INCH = 160
STYLE: dict[RcKeyType, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e9ed",
    "axes.edgecolor": LIGHT_GREY,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.axisbelow": True,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "svg.hashsalt": "xbai",
}


@dataclass(frozen=True)
class Line:
    """How one curve looks; of those that coincide, the wide ones lie below and stay visible."""

    label: str
    color: str
    dashes: str = "-"
    marker: str | None = "o"
    width: float = 1.8
    marker_size: float = 4.0


RIGHT = Line("right answers", BLUE)
WRONG = Line("wrong answers", RED, "--")


def draw_line(axis: Axes, x: np.ndarray, y: np.ndarray, line: Line, error: np.ndarray | None = None) -> None:
    """One curve; `error` (standard errors, nan where unknown) becomes a band of 95 % confidence within [0, 1]."""
    axis.plot(x, y, line.dashes, color=line.color, marker=line.marker, label=line.label, lw=line.width,
              ms=line.marker_size, zorder=3 - line.width / 10 - line.marker_size / 100)  # fmt: skip
    if error is not None:
        band = CONFIDENCE * np.nan_to_num(error)
        low, high = np.clip(y - band, 0, 1), np.clip(y + band, 0, 1)
        axis.fill_between(x, low, high, color=line.color, alpha=0.13, lw=0)


@contextmanager
def new_figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches to draw on; then it is written in one piece, in the format of the name's suffix.

    Raises:
        UserError: there is no such format, or no file can be written there.
    """
    check_figure(path)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        yield figure
        with atomic_write(path) as stream:
            figure.savefig(stream, dpi=DOTS_PER_INCH, format=path.suffix[1:].lower(), facecolor="white")


def draw_panels(
    path: Path, panels: Sequence[Callable[[Axes], None]], columns: int, size: tuple[float, float], title: str = ""
) -> None:
    """Write a figure of panels, each of `size` inches, in rows of at most `columns`; raises as `new_figure` does."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with new_figure(path, size[0] * columns, size[1] * rows) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).flat
        # The last row may have room.
        for axis, draw in zip(axes, panels, strict=False):
            draw(axis)
        for axis in figure.axes[len(panels) :]:
            axis.set_visible(False)
        if title:
            figure.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12)


def check_figure(path: Path) -> None:
    """Refuse the name of a figure that could not be written (call it before the work whose outcome is drawn).

    Raises:
        UserError: there is no such format, or no file can be written there.
    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: a figure's name ends in {', '.join(FORMATS)}")
    check_writable(path)
