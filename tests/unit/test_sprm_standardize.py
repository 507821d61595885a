"""The start of a fresh score head, against the plain formula and over many random heads."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xbai.sprm import (
    FeatureMoments,
    ScoreHead,
    ScoreObjective,
    StepCounts,
    count_by_class,
    observed_inputs,
    shift_head,
    sprm_loss,
    standardize_head,
    start_shift,
    start_totals,
    unfolded,
)
from xbai.sprm.standardize import MOST_CERTAIN, starting_score

HIDDEN = 32


def steps_with_a_huge_coordinate(rows: int, seed: int) -> torch.Tensor:
    """[rows, HIDDEN] whose mean's norm is 40 times their deviation from it."""
    features = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed))
    deviation = (features - features.mean(0)).norm(dim=1).mean()
    features[:, 7] += 40 * deviation
    return features


def fresh_head(seed: int = 0, normalize_features: bool = False) -> ScoreHead:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ScoreHead(HIDDEN, normalize_features=normalize_features).eval()


def start(head: ScoreHead, features: torch.Tensor) -> None:
    """Every row is a response of one step; a third of them is right."""
    with observed_inputs(head) as moments:
        head(features)
    standardize_head(head, moments)
    ones = torch.ones(len(features), 1, dtype=torch.bool)
    labels = (torch.arange(len(features)) % 3 == 0).float()
    shift_head(head, start_shift(start_totals(head(features)[:, None], ones, labels, ones[:, 0]), ScoreObjective()))


def objective_of(agreement: bool, balance: bool) -> ScoreObjective:
    return ScoreObjective(agreement_weighting=agreement, class_balance=balance)


def one_sided(logits: torch.Tensor) -> bool:
    return bool((logits > 0).all() or (logits <= 0).all())


@torch.no_grad()
def test_fresh_heads_are_not_one_sided():
    seen, others = (steps_with_a_huge_coordinate(400, seed) for seed in (0, 1))
    assert seen.mean(0).norm() / (seen - seen.mean(0)).norm(dim=1).mean() == pytest.approx(40, rel=0.01)
    before = after = 0
    for seed in range(200):
        head = fresh_head(seed)
        before += one_sided(head(others))
        start(head, seen)
        after += one_sided(head(others))
    assert before > 200 / 3
    assert after < 200 * 0.05


@torch.no_grad()
@pytest.mark.parametrize("normalize_features", [False, True])
def test_the_head_computes_what_it_did_on_standardised_features(normalize_features):
    features = steps_with_a_huge_coordinate(300, 0)
    features[:, 3] = 5.0
    head, plain = fresh_head(0, normalize_features), fresh_head()
    seen = torch.nn.functional.rms_norm(features, (HIDDEN,), eps=1e-6) if normalize_features else features
    deviation = seen.double().std(0, correction=0)
    if not normalize_features:
        assert deviation[3] == 0
    deviation = deviation.clamp(min=0.1 * deviation[deviation > 1e-9].median())
    expected = plain(((seen.double() - seen.double().mean(0)) / deviation).float())
    with observed_inputs(head) as moments:
        for part in features.split(70):
            head(part[None])
    assert moments.count == 300
    assert not head[0]._forward_pre_hooks
    standardize_head(head, moments)
    torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=2e-4)
    assert list(head.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias"]


@pytest.mark.parametrize("normalize_features", [False, True])
def test_an_optimiser_learns_as_behind_a_fixed_standardisation(normalize_features):
    features = steps_with_a_huge_coordinate(300, 0)
    labels = (features[:, 3] > 0).float()
    seen = torch.nn.functional.rms_norm(features, (HIDDEN,), eps=1e-6) if normalize_features else features
    head, plain = fresh_head(0, normalize_features), fresh_head()
    with observed_inputs(head) as moments:
        head(features)
    standardize_head(head, moments)
    standardized = ((seen.double() - moments.standardization.mean) / moments.standardization.deviation).float()
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-2, weight_decay=0.1) for one in (head, plain)]
    for _ in range(30):
        for one, optimizer, inputs in zip((head, plain), optimizers, (features, standardized)):
            torch.nn.functional.binary_cross_entropy_with_logits(one(inputs), labels).backward()
            with unfolded(one):
                torch.nn.utils.clip_grad_norm_(one.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
    assert ((plain(standardized) > 0) == (labels > 0.5)).float().mean() > 0.9
    difference = head(features) - plain(standardized)
    assert difference.abs().mean() < 0.01 * plain(standardized).std()
    assert list(head.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias"]


@pytest.mark.parametrize(("standardized", "dead"), [(False, True), (True, False)])
def test_what_a_huge_coordinate_does_to_a_head_that_learns_on_it(standardized, dead):
    """The fold alone does not keep it alive: all logits move together, by the weights of that coordinate.

    In a head so small those are few; ten times the published learning rate makes up for it.
    """
    objective, generator = ScoreObjective(), torch.Generator().manual_seed(0)
    rows = torch.ones(300, dtype=torch.bool)
    labels = (torch.rand(300, generator=generator) < 0.4).float()
    head = fresh_head()
    start(head, steps_with_a_huge_coordinate(300, 0))
    if not standardized:
        head.standardization = None
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for update in range(30):
        logits = head(steps_with_a_huge_coordinate(300, update))[:, None]
        counted = objective.counted_steps(logits.detach(), rows[:, None], labels, rows)
        counts = StepCounts(*count_by_class(counted, labels).tolist())
        sprm_loss(logits, counted, labels, counts).backward()
        with unfolded(head):
            optimizer.step()
            optimizer.zero_grad()
    assert (min(counts.positive, counts.negative) == 0) == dead


def test_a_step_that_is_left_out_changes_nothing():
    head = fresh_head()
    start(head, steps_with_a_huge_coordinate(300, 0))
    before = copy.deepcopy(head.state_dict())
    with unfolded(head):
        assert not torch.equal(head[0].weight, before["0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_features_that_do_not_move_are_safe():
    moments = FeatureMoments(4)
    moments.add(torch.tensor([1e4, 0.0, -3.3, 0.1]).expand(9, 4))
    assert moments.standardization.deviation.tolist() == [1.0] * 4
    assert moments.standardization.mean.tolist() == pytest.approx([1e4, 0.0, -3.3, 0.1])
    head = ScoreHead(4).eval()
    standardize_head(head, moments)
    assert head(torch.tensor([[1e4, 0.5, -3.3, 0.1]])).isfinite().all()


def test_moments_survive_a_mean_that_is_large():
    features = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 1e3, 1e5])
    moments = FeatureMoments(3)
    moments.add(features)
    torch.testing.assert_close(
        moments.standardization.deviation, features.double().std(0, correction=0), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("balance", [False, True])
def test_the_start_is_the_best_that_a_head_without_features_can_say(share, balance):
    rows = 1000
    labels, objective = (torch.arange(rows) < share * rows).float(), objective_of(False, balance)
    counts, ones = StepCounts(share * rows, (1 - share) * rows), torch.ones(rows, 1, dtype=torch.bool)

    def loss(logit: float) -> float:
        return sprm_loss(torch.full((rows, 1), logit), ones, labels, counts, balance).item()

    best = math.log((score := starting_score(share, objective)) / (1 - score))
    assert loss(best) < min(loss(best - 0.1), loss(best + 0.1))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(-9, 9), st.booleans(), st.booleans())
def test_the_mean_logit_is_moved_to_the_start(seed, offset, agreement, balance):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 5, generator=generator) + offset
    mask = torch.rand(6, 5, generator=generator) < 0.5
    mask[0, 0] = True
    labels, graded = (torch.rand(6, generator=generator) < 0.5).float(), torch.rand(6, generator=generator) < 0.7
    halves = [[column[:2], column[2:]] for column in (torch.where(mask, logits, torch.nan), mask, labels, graded)]
    totals = sum(start_totals(*half) for half in zip(*halves))
    moved = (logits[mask] + start_shift(totals, objective_of(agreement, balance))).mean().sigmoid().item()
    steps = mask & graded[:, None]
    share = (int((steps & (labels > 0.5)[:, None]).sum()) + 1) / (int(steps.sum()) + 2)
    expected = 0.5 if agreement else 0.6 if balance else min(max(share, 1 - MOST_CERTAIN), MOST_CERTAIN)
    assert moved == pytest.approx(expected, abs=1e-5)
