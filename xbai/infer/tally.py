"""How good the results are so far."""

from __future__ import annotations

from collections import defaultdict

from xbai.results.lines import SampleKey
from xbai.search.best_of_n import best_candidate


class Tally:
    """Accuracy of the samples graded so far, and of the best of each `best_of` of a question, by score.

    Attributes:
        best_of: candidates among which the score chooses.
        graded: samples that have a grade.
    """

    def __init__(self, best_of: int = 1) -> None:
        self.best_of = best_of
        self.graded = 0
        self._correct = 0.0
        self._groups: defaultdict[tuple[int, int], list[tuple[float | None, float | None]]] = defaultdict(list)
        self._chosen: list[float] = []

    def add(self, key: SampleKey, score: float | None, grade: float | None) -> None:
        """Count one sample; a grade of None is none."""
        if grade is not None:
            self.graded += 1
            self._correct += grade
        if self.best_of == 1:
            return
        name = key[0], key[1] // self.best_of
        group = self._groups[name]
        group.append((score, grade))
        if len(group) == self.best_of:
            candidates = [(score, grade) for score, grade in self._groups.pop(name) if None not in (score, grade)]
            if candidates:
                scores, grades = zip(*candidates, strict=True)
                self._chosen.append(grades[best_candidate(list(scores))])

    @property
    def accuracy(self) -> float | None:
        """Share of right samples; None before the first grade."""
        return self._correct / self.graded if self.graded else None

    @property
    def best_of_n(self) -> float | None:
        """Share of groups whose best sample is right; None before the first group."""
        return sum(self._chosen) / len(self._chosen) if self._chosen else None

    def __str__(self) -> str:
        """Both in words, as far as they are known."""
        if self.accuracy is None:
            return ""
        best = "" if self.best_of_n is None else f", best of {self.best_of}: {self.best_of_n:.1%}"
        return f"accuracy {self.accuracy:.1%}{best}"
