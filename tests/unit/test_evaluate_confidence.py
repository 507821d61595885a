"""Confidence of stretches of a response, against every stretch looked at token by token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xbai.engine import Completion
from xbai.measure.confidence import WINDOW_TOKENS, lowest_window, running_log_probs, tail
from xbai.measure.graded import GradedQuestion
from xbai.measure.metrics import measure
from xbai.measure.strategies import possible_strategies


@dataclass
class Response:
    log_probs: list[float]
    ends: list[int]

    @property
    def sums(self) -> list[float]:
        sums = Completion([], "", "stop", self.log_probs, step_ends=self.ends).step_log_probs
        assert sums is not None
        return sums

    @property
    def stretches(self) -> list[list[float]]:
        """The tokens of each step, and of what follows the last one."""
        made: list[list[float]] = [[] for _ in range(len(self.ends) + 1)]
        for place, log_prob in enumerate(self.log_probs):
            made[sum(end <= place for end in self.ends)].append(log_prob)
        return made


@st.composite
def responses(draw: st.DrawFn) -> Response:
    log_probs = draw(st.lists(st.floats(-20, 0), min_size=1, max_size=40))
    ends = draw(st.sets(st.integers(1, len(log_probs)), max_size=12))
    return Response(log_probs, sorted(ends))


def first_of_enough_tokens(stretches: list[list[float]], window: int) -> list[float] | None:
    """The tokens of the first stretches that together have `window`; None where all do not."""
    tokens: list[float] = []
    for stretch in stretches:
        tokens += stretch
        if len(tokens) >= window:
            return tokens
    return None


same = partial(pytest.approx, abs=1e-9)


@settings(max_examples=300, deadline=None)
@given(responses(), st.integers(1, 50))
def test_confidences_are_those_of_a_look_at_every_stretch(response: Response, window: int) -> None:
    stretches, size = response.stretches, len(response.log_probs)
    assert response.sums == same([sum(stretch) for stretch in stretches])
    begun = (first_of_enough_tokens(stretches[begin:], window) for begin in range(len(stretches)))
    windows = [tokens for tokens in begun if tokens is not None] or [response.log_probs]
    found = lowest_window(response.sums, response.ends, size, window)
    assert found == same(min(np.mean(tokens) for tokens in windows))
    last = first_of_enough_tokens([stretch[::-1] for stretch in stretches[::-1]], window) or response.log_probs
    assert tail(response.sums, response.ends, size, window) == same(np.mean(last))
    so_far = [np.mean(response.log_probs[:end]) for end in response.ends]
    assert running_log_probs(response.sums, response.ends) == same(so_far)


def test_a_response_without_a_token_comes_last() -> None:
    assert lowest_window([0.0], [], 0) == tail([0.0], [], 0) == -np.inf


def test_the_candidate_whose_weakest_stretch_or_end_is_surest_is_chosen() -> None:
    """Of equal mean log-probs: one weak in the middle and right, one at the end."""
    sure, unsure = -0.1 * WINDOW_TOKENS, -1.0 * WINDOW_TOKENS
    ends = [WINDOW_TOKENS, 2 * WINDOW_TOKENS]
    question = GradedQuestion(
        key=(0, "q"),
        scores=np.full(2, -np.inf),
        correct=np.array([1.0, 0.0]),
        keys=[None, None],
        step_scores=[None, None],
        token_counts=[3 * WINDOW_TOKENS] * 2,
        finish_reasons=["stop"] * 2,
        mean_log_probs=np.full(2, -0.4),
        step_ends=[ends, ends],
        step_log_probs=[[sure, unsure, sure], [sure, 0.9 * unsure, sure + 0.1 * unsure]],
    )
    curves = measure([question]).curves
    assert curves["best_of_n_tail"][2].mean == 1.0
    assert curves["best_of_n_lowest_window"][2].mean == 0.0
    older = replace(question, step_ends=None, step_log_probs=None)
    partly = replace(question, step_log_probs=[[sure, unsure, sure], None])
    for lacking in (older, partly):
        assert not {"best_of_n_lowest_window", "best_of_n_tail"} & set(possible_strategies([question, lacking]))
        assert "best_of_n_log_prob" in possible_strategies([question, lacking])
