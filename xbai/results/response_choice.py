"""The response that a result line names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from xbai.benchmarks.registry import get_benchmark
from xbai.grading import AnswerGroups
from xbai.results.run_budget import RunBudget
from xbai.results.settings import choice_of
from xbai.search.choice import best_candidate, voted_candidate

Choose = Callable[[Sequence[str], Sequence[float | None]], str]
"""Responses to a question and their scores -> the response chosen; "" where there is none."""


@contextmanager
def response_choice(settings: Mapping[str, Any]) -> Iterator[Choose]:
    """Chooses by score, by the rule of the run's budget, or by the vote that the settings ask for.

    Votes on mathematics are counted in processes (see `AnswerGroups`), which end with the context.
    """
    budget = RunBudget.from_settings(settings)
    choice = choice_of(settings)
    if choice == "best_of_n" and (budget is None or not budget.rule.needs_answers):
        yield lambda responses, scores: responses[best_candidate(list(scores))] if responses else ""
        return
    with AnswerGroups(get_benchmark(settings["task"]).data_source) as groups:

        def voted(responses: Sequence[str], scores: Sequence[float | None]) -> str:
            (votes,) = groups.of([responses])
            if budget is not None:
                chosen = budget.choose(scores, votes)
                return "" if chosen is None else responses[chosen]
            return responses[voted_candidate(votes, scores, choice == "weighted_vote")] if responses else ""

        yield voted
