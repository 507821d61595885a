"""The response that a result line names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from xbai.benchmarks.registry import get_benchmark
from xbai.grading import AnswerGroups
from xbai.results.settings import choice_of
from xbai.search.best_of_n import best_candidate
from xbai.search.majority import voted_candidate


class ResponseChoice:
    """Chooses among the responses to a question: by score, or by the vote that the settings ask for.

    Use as a context manager: votes on mathematics are counted in processes (see `AnswerGroups`).
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._choice = choice_of(settings)
        self._groups = None
        if self._choice != "best_of_n":
            self._groups = AnswerGroups(get_benchmark(settings["task"]).data_source)

    def __call__(self, responses: Sequence[str], scores: Sequence[float | None]) -> str:
        """The response chosen; empty where there is none."""
        if not responses:
            return ""
        if self._groups is None:
            return responses[best_candidate(list(scores))]
        (votes,) = self._groups.of([responses])
        return responses[voted_candidate(votes, scores, weighted=self._choice == "weighted_vote")]

    def __enter__(self) -> ResponseChoice:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._groups is not None:
            self._groups.close()
