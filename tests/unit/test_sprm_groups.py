"""Metrics within the responses to a prompt, against plain loops."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xbai.sprm import auc, best_of_n_gain, within_prompt_auc

ROWS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.1, 0.2, 0.3]), st.booleans()), max_size=24)


def columns(rows):
    scores = torch.tensor([score for _, score, _ in rows])
    return scores, torch.tensor([float(right) for *_, right in rows]), [prompt for prompt, *_ in rows]


@settings(max_examples=80, deadline=None)
@given(ROWS)
def test_auc_is_the_share_of_pairs_of_the_same_prompt_averaged_over_prompts(rows):
    shares = []
    for prompt in "abc":
        right, wrong = ([s for p, s, y in rows if p == prompt and y == side] for side in (True, False))
        pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in product(right, wrong)]
        shares += [sum(pairs) / len(pairs)] if pairs else []
    expected = sum(shares) / len(shares) if shares else math.nan
    assert within_prompt_auc(*columns(rows)) == pytest.approx(expected, nan_ok=True)


@settings(max_examples=80, deadline=None)
@given(ROWS)
def test_gain_is_that_of_choosing_over_drawing(rows):
    gains = []
    for prompt in "abc":
        group = [(score, float(right)) for p, score, right in rows if p == prompt]
        if group:
            best = [right for score, right in group if score == max(group)[0]]
            gains.append(sum(best) / len(best) - sum(right for _, right in group) / len(group))
    expected = sum(gains) / len(gains) if gains else math.nan
    assert best_of_n_gain(*columns(rows)) == pytest.approx(expected, nan_ok=True, abs=1e-9)


def test_a_score_that_only_knows_which_question_is_easy_chooses_nothing():
    labels = torch.tensor([1.0, 1, 1, 0] * 20 + [0.0, 0, 0, 1] * 20)
    prompts = torch.arange(40).repeat_interleave(4).numpy()
    scores = torch.tensor([0.9, 0.1]).repeat_interleave(80)
    assert auc(scores, labels) == 0.75
    assert within_prompt_auc(scores, labels, prompts) == 0.5
    assert best_of_n_gain(scores, labels, prompts) == 0.0
