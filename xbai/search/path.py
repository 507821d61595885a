"""A response on its way: what a step-level search keeps, ranks and continues."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from xbai.aggregation import aggregate


@dataclass(frozen=True)
class SearchPath:
    """The response to one question as far as it is written.

    Attributes:
        text: of the response, without the prompt.
        token_count: tokens of `text`.
        step_scores: one a step.
        finish_reason: `stop` (the model ended it), `length` (tokens or context ran out), or None: it can go on.
    """

    text: str = ""
    token_count: int = 0
    step_scores: tuple[float, ...] = ()
    finish_reason: Literal["stop", "length"] | None = None

    @property
    def open(self) -> bool:
        """It can go on."""
        return self.finish_reason is None

    @property
    def score(self) -> float:
        """The trajectory score so far."""
        return aggregate(self.step_scores)


ROOT = SearchPath()
"""Where every search begins: nothing is written yet."""

Value = Callable[[SearchPath], float]
"""How promising a path is, in [0, 1]."""


def step_value(how: str) -> Value:
    """The value by one of `xbai.aggregation.AGGREGATIONS`: `last` is the step score, `geometric` the running score."""
    return lambda path: aggregate(path.step_scores, how)


def highest(paths: Iterable[SearchPath], count: int, value: Value) -> list[SearchPath]:
    """The `count` best distinct paths, best first; those cut off by a limit come last, of equals the first stays."""
    distinct: dict[str, SearchPath] = {}
    for path in paths:
        distinct.setdefault(path.text, path)
    ranked = sorted(distinct.values(), key=lambda path: (path.finish_reason == "length", -value(path)))
    return ranked[:count]
