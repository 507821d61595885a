"""The candidate that a vote chooses, and the response that a search chooses."""

from __future__ import annotations

import pytest

from xbai.results.response_choice import response_choice
from xbai.search.choice import voted_candidate

RESPONSES = ["\\boxed{1}", "\\boxed{2}", "\\boxed{2.0}", "no answer"]
KEYS = ["1", "2", "2", None]


@pytest.mark.parametrize(
    ("scores", "weighted", "chosen"),
    [
        ([0.9, 0.1, 0.2, 0.99], False, 2),
        ([0.9, 0.1, 0.2, 0.99], True, 0),
        ([None] * 4, False, 1),
        ([None, 0.1, None, 0.99], True, 1),
    ],
)
def test_the_best_of_those_that_gave_the_winning_answer(
    scores: list[float | None], weighted: bool, chosen: int
) -> None:
    assert voted_candidate(KEYS, scores, weighted) == chosen


def test_without_any_answer_the_score_decides() -> None:
    assert voted_candidate([None, None], [0.1, 0.2], weighted=False) == 1


@pytest.mark.parametrize(("search", "chosen"), [("best_of_n", 3), ("majority", 2), ("weighted_vote", 0), (None, 3)])
def test_the_response_that_a_search_chooses(search: str | None, chosen: int) -> None:
    settings = {"task": "math500", "search": {"name": search}} if search else {}
    with response_choice(settings) as choose:
        assert choose(RESPONSES, [0.9, 0.1, 0.2, 0.99]) == RESPONSES[chosen]
        assert choose([], []) == ""
