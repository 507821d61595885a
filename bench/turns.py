"""Comparing what takes turns: on a machine whose speed drifts, all of it is measured at all times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000


def in_turns(names: Iterable[str], turns: int) -> Iterator[tuple[int, str]]:
    """Each turn's number, from 0, and its arms: forwards (ABC), backwards (CBA), and so on."""
    forwards = list(names)
    for turn in range(turns):
        for name in forwards if turn % 2 == 0 else reversed(forwards):
            yield turn, name


def take_turns(arms: Mapping[str, Callable[[], float]], repeats: int, warm_ups: int) -> dict[str, list[float]]:
    """The figures of each arm, `repeats` of them, in the order of `in_turns`.

    Args:
        arms: each runs once when called and returns its figure.
        repeats: turns that count.
        warm_ups: turns before them that do not.
    """
    names = list(arms)
    for name in names * warm_ups:
        arms[name]()
    figures: dict[str, list[float]] = {name: [] for name in names}
    for _, name in in_turns(names, repeats):
        figures[name].append(arms[name]())
    return figures


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with its 95 % bootstrap interval, which does not know what differs between two runs."""

    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], base: Sequence[float]) -> Ratio:
        """Of two arms' figures over the same turns, which the bootstrap draws together."""
        over, under = np.asarray(values), np.asarray(base)
        drawn = np.random.default_rng(0).integers(len(over), size=(DRAWS, len(over)))
        ratios = np.median(over[drawn], axis=1) / np.median(under[drawn], axis=1)
        low, high = np.quantile(ratios, [0.025, 0.975])
        return cls(float(np.median(over) / np.median(under)), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.ratio:.3f} ({self.low:.3f} to {self.high:.3f})"
