"""The losses of whole responses against plain loops over responses and pairs."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xbai.sprm import ScoreObjective, ScoreTotals
from xbai.sprm.objective import TRAINED_AGGREGATIONS, log_odds, pairwise_loss, rival_scores

ROWS, GROUPS = 12, 4


def random_batch(seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(ROWS, 9, generator=generator, dtype=torch.float64)
    mask = torch.rand(ROWS, 9, generator=generator) < 0.4
    labels = (torch.rand(ROWS, generator=generator) < 0.5).float()
    graded = torch.rand(ROWS, generator=generator) < 0.8
    groups = torch.randint(0, GROUPS, (ROWS,), generator=generator).tolist()
    return logits, mask, labels, graded, groups


def plain_score(logits: list[float], aggregation: str) -> float:
    """The aggregated score, not its logarithm."""
    scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    if aggregation == "product":
        return math.prod(scores)
    if aggregation == "geometric":
        return math.prod(scores) ** (1 / len(scores))
    if aggregation == "mean_logit":
        return 1 / (1 + math.exp(-sum(logits) / len(logits)))
    mean = sum(math.exp(-logit) for logit in logits) / len(logits)
    return 1 / (1 + mean)


def plain_log_odds(score: float) -> float:
    return math.log(score) - math.log1p(-score)


def plain_scores(logits, mask, aggregation: str) -> list[float | None]:
    rows = [row[there].tolist() for row, there in zip(logits, mask)]
    return [plain_score(row, aggregation) if row else None for row in rows]


def plain_pairwise(logits, mask, labels, graded, groups, aggregation: str) -> float:
    scores = plain_scores(logits, mask, aggregation)
    kept = [row for row in range(ROWS) if graded[row] and scores[row] is not None]
    losses = []
    for right, wrong in itertools.permutations(kept, 2):
        if groups[right] == groups[wrong] and labels[right] > labels[wrong]:
            margin = plain_log_odds(scores[right]) - plain_log_odds(scores[wrong])
            losses.append(math.log1p(math.exp(-margin)))
    return sum(losses) / len(losses) if losses else 0.0


def plain_outcome(logits, mask, labels, graded, aggregation: str, class_balance: bool) -> float:
    scores = plain_scores(logits, mask, aggregation)
    kept = [(s, y) for s, y, g in zip(scores, labels.tolist(), graded) if g and s is not None]
    right, wrong = sum(y == 1 for _, y in kept), sum(y == 0 for _, y in kept)
    weight = {1.0: 1.5 * wrong / (right + wrong), 0.0: right / (right + wrong)} if class_balance and kept else {}
    weights = [weight.get(y, 1.0) for _, y in kept]
    terms = [-math.log(s) if y == 1 else -math.log1p(-min(s, math.exp(-1e-6))) for s, y in kept]
    return sum(w * t for w, t in zip(weights, terms)) / sum(weights) if sum(weights) else 0.0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(TRAINED_AGGREGATIONS))
def test_log_odds_are_those_of_the_aggregated_scores(seed, aggregation):
    logits, mask, *_ = random_batch(seed)
    values = log_odds(torch.where(mask, logits, torch.nan), mask, aggregation).tolist()
    for value, expected in zip(values, plain_scores(logits, mask, aggregation)):
        assert value == pytest.approx(0.0 if expected is None else plain_log_odds(expected), rel=1e-3, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(TRAINED_AGGREGATIONS))
def test_the_pairwise_loss_equals_a_loop_over_pairs(seed, aggregation):
    logits, mask, labels, graded, groups = random_batch(seed)
    loss = ScoreObjective("pairwise", aggregation)(logits, mask, labels, graded, groups)
    expected = plain_pairwise(logits, mask, labels, graded, groups, aggregation)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(TRAINED_AGGREGATIONS), st.booleans())
def test_the_outcome_loss_equals_a_loop_over_responses(seed, aggregation, class_balance):
    logits, mask, labels, graded, groups = random_batch(seed)
    objective = ScoreObjective("outcome_bce", aggregation, class_balance=class_balance)
    expected = plain_outcome(logits, mask, labels, graded, aggregation, class_balance)
    assert objective(logits, mask, labels, graded, groups).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss", ["step_bce", "outcome_bce", "pairwise", "both"])
@pytest.mark.parametrize("aggregation", TRAINED_AGGREGATIONS)
@pytest.mark.parametrize("split", [1, 5])
def test_shares_of_micro_batches_add_up_in_value_and_gradient(loss, aggregation, split):
    logits, mask, labels, graded, groups = random_batch(0)
    objective = ScoreObjective(loss, aggregation, agreement_weighting=False)
    whole = logits.clone().requires_grad_()
    expected = objective(whole, mask, labels, graded, groups)
    expected.backward()
    counted = objective.counted_steps(logits, mask, labels, graded)
    rivals = objective.rivals(logits, mask, labels, graded, groups)
    totals = ScoreTotals.from_tensor(objective.local_totals(counted, mask, labels, graded, rivals))
    assert expected.item() > 0
    if not objective.judges_responses:
        return
    parts = logits.clone().requires_grad_()
    alone = ScoreObjective("pairwise" if loss == "both" else loss, aggregation)
    columns = (column.split(split) for column in (parts, mask, labels, graded, rivals))
    shares = sum(alone.response_loss(*part, totals) for part in zip(*columns))
    reference = logits.clone().requires_grad_()
    whole_response = alone.response_loss(reference, mask, labels, graded, rivals, totals)
    shares.backward()
    whole_response.backward()
    assert shares.item() == pytest.approx(whole_response.item(), rel=1e-5)
    assert torch.allclose(parts.grad, reference.grad, atol=1e-7)
    if loss != "both":
        assert torch.allclose(parts.grad, whole.grad, atol=1e-7)


def test_the_pairwise_gradient_is_that_of_the_pairs_themselves():
    """Comparing with rivals as they were before the update loses nothing at the first update, and nothing drifts."""
    scores = torch.tensor([-0.5, -1.0, -0.2, -2.0, 0.7], dtype=torch.float64, requires_grad=True)
    labels, counted = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0]), torch.ones(5, dtype=torch.bool)
    right, wrong = [0, 4], [1, 2, 3]
    pairs = sum(torch.nn.functional.softplus(scores[j] - scores[i]) for i, j in itertools.product(right, wrong))
    (of_pairs,) = torch.autograd.grad(pairs, scores)
    rivals = rival_scores(scores.detach(), labels, counted, ["a"] * 5)
    loss = pairwise_loss(scores, labels, counted, rivals, total=12)
    loss.backward()
    assert loss.item() == pytest.approx(pairs.item() / 6)
    assert torch.allclose(scores.grad, of_pairs / 12)
    assert scores.grad.sum().abs() < 1e-12


def test_a_loss_that_compares_is_not_computed_without_rivals():
    logits, mask, labels, graded, _ = random_batch(0)
    objective = ScoreObjective("pairwise")
    counted = objective.counted_steps(logits, mask, labels, graded)
    totals = ScoreTotals.from_tensor(objective.local_totals(counted, mask, labels, graded, None))
    with pytest.raises(ValueError, match="loss=pairwise compares responses with their rivals"):
        objective.response_loss(logits, mask, labels, graded, None, totals)


def test_rivals_are_of_the_same_prompt_and_the_other_label_and_count():
    scores, labels = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0])
    counted = torch.tensor([True, True, False, True, True])
    rivals = rival_scores(scores, labels, counted, ["a", "a", "a", "b", "c"])
    found = [sorted(row[~row.isnan()].tolist()) for row in rivals]
    assert found == [[2.0], [1.0], [], [], []]


@pytest.mark.parametrize("loss", ["outcome_bce", "pairwise", "both"])
@pytest.mark.parametrize("aggregation", TRAINED_AGGREGATIONS)
@pytest.mark.parametrize("case", ["no step", "only wrong", "nothing graded", "saturated"])
def test_degenerate_batches_have_a_finite_loss_that_can_be_differentiated(loss, aggregation, case):
    logits, mask, labels, graded, groups = random_batch(1)
    logits = torch.where(mask, logits * (1e4 if case == "saturated" else 1), torch.nan).requires_grad_()
    mask = torch.zeros_like(mask) if case == "no step" else mask
    graded = torch.zeros_like(graded) if case == "nothing graded" else graded
    labels = torch.zeros_like(labels) if case == "only wrong" else labels
    value = ScoreObjective(loss, aggregation, agreement_weighting=False)(logits, mask, labels, graded, groups)
    value.backward()
    assert math.isfinite(value.item())
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("aggregation", ["product", "soft_min"])
def test_the_worst_step_takes_most_of_a_wrong_responses_gradient(aggregation):
    logits = torch.tensor([[4.0, 4.0, 0.0, 4.0]], requires_grad=True)
    mask, graded = torch.ones(1, 4, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    ScoreObjective("outcome_bce", aggregation, class_balance=False)(
        logits, mask, torch.zeros(1), graded, [0]
    ).backward()
    assert logits.grad[0, 2] > 0.9 * logits.grad.sum() > 0
