"""Score, loss and metrics against plain loops over steps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xbai.sprm import (
    AGGREGATIONS,
    StepCounts,
    aggregate,
    auc,
    count_by_class,
    counted_steps,
    scale_gradient,
    sprm_loss,
    sprm_metrics,
    trajectory_scores,
)


def random_batch(seed: int, rows: int = 7, time: int = 9):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, time, generator=generator) * 2
    mask = torch.rand(rows, time, generator=generator) < 0.4
    labels = (torch.rand(rows, generator=generator) < 0.5).float()
    graded = torch.rand(rows, generator=generator) < 0.8
    return logits, mask, labels, graded


def plain_loss(logits, mask, labels, graded, agreement_weighting, class_balance) -> float:
    steps = []
    for row in range(len(labels)):
        for t in range(logits.shape[1]):
            if not (mask[row, t] and graded[row]):
                continue
            score, y = torch.sigmoid(logits[row, t].double()).item(), labels[row].item()
            agrees = (score > 0.5 and y == 1) or (score < 0.5 and y == 0)
            if agrees or not agreement_weighting:
                steps.append((y, -math.log(score) if y == 1 else -math.log1p(-score)))
    positive, negative = sum(y == 1 for y, _ in steps), sum(y == 0 for y, _ in steps)
    if class_balance and steps:
        total = positive + negative
        weights = [1.5 * negative / total if y == 1 else positive / total for y, _ in steps]
    else:
        weights = [1.0] * len(steps)
    return sum(w * bce for w, (_, bce) in zip(weights, steps)) / sum(weights) if sum(weights) > 0 else 0.0


def loss_of(logits, mask, labels, graded, agreement_weighting, class_balance, splits=1):
    counted = counted_steps(logits, mask, labels, graded, agreement_weighting)
    counts = StepCounts(*count_by_class(counted, labels).tolist())
    parts = zip(logits.split(splits), counted.split(splits), labels.split(splits))
    return sum(sprm_loss(*part, counts, class_balance) for part in parts)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans(), st.sampled_from([1, 3, 7]))
def test_loss_equals_plain_loop_whatever_the_split(seed, agreement, balance, split):
    batch = random_batch(seed)
    expected = plain_loss(*batch, agreement, balance)
    assert loss_of(*batch, agreement, balance, split).item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("case", ["no step", "only wrong", "only right", "nothing graded"])
def test_degenerate_batches_have_a_zero_loss_that_can_be_differentiated(case):
    logits, mask, labels, graded = random_batch(0)
    logits.requires_grad_()
    if case == "no step":
        mask = torch.zeros_like(mask)
    elif case == "nothing graded":
        graded = torch.zeros_like(graded)
    else:
        labels = torch.full_like(labels, float(case == "only right"))
    loss = loss_of(logits, mask, labels, graded, False, True, 7)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_steps_that_disagree_get_no_gradient():
    logits = torch.tensor([[2.0, -2.0], [2.0, -2.0]], requires_grad=True)
    loss = loss_of(
        logits, torch.ones(2, 2, dtype=torch.bool), torch.tensor([1.0, 0.0]), torch.ones(2).bool(), True, True, 2
    )
    loss.backward()
    assert (logits.grad != 0).tolist() == [[True, False], [False, True]]


def test_values_off_the_mask_cannot_poison_the_loss():
    logits, mask, labels, graded = random_batch(1)
    expected = loss_of(logits, mask, labels, graded, False, True, 7)
    poisoned = torch.where(mask, logits, torch.nan)
    assert torch.equal(loss_of(poisoned, mask, labels, graded, False, True, 7), expected)


def test_gradient_scale_changes_only_the_gradient():
    x = torch.ones(3, requires_grad=True)
    y = scale_gradient(x, 1e-4)
    assert torch.equal(x, y)
    y.sum().backward()
    assert torch.allclose(x.grad, torch.full((3,), 1e-4))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=40))
def test_trajectory_score_is_the_geometric_mean(scores):
    logits = torch.logit(torch.tensor(scores, dtype=torch.float64)).float()[None]
    value = trajectory_scores(logits, torch.ones_like(logits, dtype=torch.bool)).item()
    assert value == pytest.approx(math.prod(scores) ** (1 / len(scores)), rel=1e-4)
    assert aggregate(scores) == pytest.approx(value, rel=1e-4)


def test_trajectory_score_neither_under_nor_overflows():
    logits = torch.full((1, 5000), -50.0)
    mask = torch.ones_like(logits, dtype=torch.bool)
    assert trajectory_scores(logits, mask).item() == pytest.approx(math.exp(-50), rel=1e-4)
    assert trajectory_scores(logits, ~mask).item() == 0.0
    assert all(aggregate([], how) == 0.0 for how in AGGREGATIONS)
    assert aggregate([0.0, 0.9]) == 0.0


def test_aggregations():
    scores = [0.5, 0.25, 0.75]
    expected = {"arithmetic": 0.5, "product": 0.09375, "min": 0.25, "last": 0.75, "geometric": 0.09375 ** (1 / 3)}
    expected |= {"lowest_third": 0.25, "soft_min": 3 / (2 + 4 + 4 / 3)}
    assert {how: aggregate(scores, how) for how in AGGREGATIONS} == pytest.approx(expected)
    assert aggregate([0.9, 0.1, 0.3, 0.8, 0.7, 0.6], "lowest_third") == pytest.approx(0.2)
    assert aggregate([0.3, 0.1], "lowest_third") == 0.1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-6, 1 - 1e-6), min_size=1, max_size=40))
def test_the_soft_minimum_is_one_in_log_odds_and_in_log_space(scores):
    values = torch.tensor(scores, dtype=torch.float64)
    found = aggregate(scores, "soft_min")
    for space, back in ((torch.logit, torch.sigmoid), (torch.log, torch.exp)):
        negative_mean_exp = torch.logsumexp(-space(values), 0) - math.log(len(scores))
        assert found == pytest.approx(back(-negative_mean_exp).item(), rel=1e-6)
    assert min(scores) * (1 - 1e-9) <= found <= aggregate(scores) * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.3, 0.4]), st.booleans()), min_size=2, max_size=30))
def test_auc_equals_the_share_of_ordered_pairs(rows):
    right = [s for s, y in rows if y]
    wrong = [s for s, y in rows if not y]
    value = auc(torch.tensor([s for s, _ in rows]), torch.tensor([float(y) for _, y in rows]))
    if not right or not wrong:
        assert math.isnan(value)
        return
    pairs = [1.0 if r > w else 0.5 if r == w else 0.0 for r in right for w in wrong]
    assert value == pytest.approx(sum(pairs) / len(pairs))


def test_metrics_on_a_batch_read_by_hand():
    logits = torch.logit(torch.tensor([[0.8, 0.8, 0.5], [0.4, 0.9, 0.5], [0.1, 0.5, 0.5]]))
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 0]]).bool()
    metrics = sprm_metrics(logits, mask, torch.tensor([1.0, 0.0, 0.0]), torch.tensor([True, True, True]))
    assert metrics["steps_agree"] == pytest.approx(4 / 5)
    assert metrics["score_right"] == pytest.approx(0.8)
    assert metrics["score_wrong"] == pytest.approx((0.6 + 0.1) / 2)
    assert metrics["auc"] == 1.0
