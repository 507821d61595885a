"""The policy losses against plain Python: token by token, and GSPO's response by response, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from verl.trainer.config.schema import OWN_AGGREGATION, PolicyLossName
from verl.trainer.ppo.core_algos import Denominators, token_weights
from verl.trainer.ppo.policy_losses import (
    PolicyLoss,
    compute_policy_loss,
    compute_policy_loss_cispo,
    compute_policy_loss_gspo,
)

quick = settings(max_examples=50, deadline=None)
tokens_of_a_response = st.lists(st.tuples(st.floats(-2, 0), st.floats(-2, 0)), min_size=1, max_size=6)
responses = st.lists(st.tuples(st.floats(-2, 2), tokens_of_a_response), min_size=1, max_size=5)
clip = st.floats(0.01, 0.5)
Responses = list[tuple[float, list[tuple[float, float]]]]


@quick
@given(
    tokens=st.lists(st.tuples(st.floats(-2, 0), st.floats(-2, 0), st.floats(-2, 2)), min_size=1, max_size=8),
    low=st.floats(0.1, 0.5),
    high=st.floats(0.1, 0.5),
)
def test_policy_loss(tokens: list[tuple[float, float, float]], low: float, high: float) -> None:
    old, new, advantages = (torch.tensor(column, dtype=torch.float64)[None] for column in zip(*tokens))
    got = compute_policy_loss(old, new, advantages, low, high, clip_c=3.0)
    expected = []
    for old_value, new_value, advantage in tokens:
        ratio = math.exp(new_value - old_value)
        objective = min(advantage * ratio, advantage * min(max(ratio, 1 - low), 1 + high))
        expected.append(-(max(objective, 3.0 * advantage) if advantage < 0 else objective))
    assert got.loss[0].tolist() == pytest.approx(expected, abs=1e-9)
    assert got.approx_kl[0].tolist() == pytest.approx([o - n for o, n, _ in tokens], abs=1e-9)


def test_clipping_is_reported_where_it_acts() -> None:
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 4.0]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, -1.0]])
    got = compute_policy_loss(torch.zeros(1, 5), ratio.log(), advantages, 0.2, 0.2, clip_c=3.0)
    assert got.clipped.tolist() == [[True, False, False, True, False]]
    assert got.dual_clipped.tolist() == [[False, False, False, False, True]]


def test_a_diverged_token_stays_finite() -> None:
    new = torch.tensor([[500.0, 500.0, 500.0, -500.0]], requires_grad=True)
    got = compute_policy_loss(torch.zeros(1, 4), new, torch.tensor([[0.0, 1.0, -1.0, 1.0]]), 0.2, 0.2, clip_c=3.0)
    got.loss.sum().backward()
    assert got.loss.isfinite().all() and new.grad.isfinite().all()


def columns(rows: Responses) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Old and new log-probs, advantages and mask, [B, R]; what is off the mask must not matter."""
    mask = torch.arange(6) < torch.tensor([len(tokens) for _, tokens in rows])[:, None]
    old, new = torch.full((2, *mask.shape), -0.5, dtype=torch.float64)
    for row, (_, tokens) in enumerate(rows):
        old[row, : len(tokens)], new[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.float64).T
    advantages = torch.tensor([advantage for advantage, _ in rows], dtype=torch.float64)[:, None].expand(mask.shape)
    return old, new.requires_grad_(), advantages, mask


def loss_of(name: PolicyLossName, rows: Responses, low: float, high: float) -> tuple[PolicyLoss, Tensor, Tensor]:
    """Per-token outcome, the loss as it is aggregated, and its gradient [B, R] for the log-probs."""
    old, new, advantages, mask = columns(rows)
    match name:
        case "gspo":
            mean = ((new.detach() - old) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
            policy = compute_policy_loss_gspo(old, new, mean.expand(mask.shape), advantages, low, high)
        case "cispo":
            policy = compute_policy_loss_cispo(old, new, advantages, low, high)
        case _:
            policy = compute_policy_loss(old, new, advantages, low, high, clip_c=3.0)
    weights = token_weights(mask, OWN_AGGREGATION[name], Denominators(float(mask.sum()), float(len(rows))), 6)
    loss = (weights.double() * policy.loss).sum()
    (gradient,) = torch.autograd.grad(loss, new)
    return policy, loss.detach(), gradient


@quick
@given(rows=responses, low=clip, high=clip)
def test_gspo_is_the_clipped_objective_of_whole_responses(rows: Responses, low: float, high: float) -> None:
    policy, loss, gradient = loss_of("gspo", rows, low, high)
    expected, slopes = 0.0, []
    for row, (advantage, tokens) in enumerate(rows):
        ratio = math.exp(sum(new - old for old, new in tokens) / len(tokens))
        held = min(max(ratio, 1 - low), 1 + high)
        is_clipped = advantage * held < advantage * ratio
        expected -= min(advantage * ratio, advantage * held) / len(rows)
        # Of the geometric mean of n ratios, for the log-prob of each token: the ratio over n.
        slope = 0.0 if is_clipped else -advantage * ratio / len(tokens) / len(rows)
        slopes.append([slope] * len(tokens) + [0.0] * (6 - len(tokens)))
        assert policy.clipped[row, : len(tokens)].tolist() == [is_clipped] * len(tokens)
    assert float(loss) == pytest.approx(expected, abs=1e-6)
    # Weights of tokens are float32.
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64), rtol=1e-6, atol=1e-9)


@quick
@given(rows=responses, low=st.floats(0.01, 2), high=clip)
def test_cispo_weighs_every_tokens_gradient_by_its_clipped_ratio(rows: Responses, low: float, high: float) -> None:
    policy, loss, gradient = loss_of("cispo", rows, low, high)
    expected, count = 0.0, sum(len(tokens) for _, tokens in rows)
    for row, (advantage, tokens) in enumerate(rows):
        for t, (old, new) in enumerate(tokens):
            weight = min(max(math.exp(new - old), 1 - low), 1 + high)
            expected -= weight * advantage * new / count
            assert float(gradient[row, t]) == pytest.approx(-weight * advantage / count, rel=1e-6)
            assert bool(policy.clipped[row, t]) == (not 1 - low <= math.exp(new - old) <= 1 + high)
    assert float(loss) == pytest.approx(expected, abs=1e-6)


@quick
@given(rows=responses)
def test_dr_grpo_divides_by_a_constant(rows: Responses) -> None:
    _, loss, _ = loss_of("dr_grpo", rows, 0.2, 0.3)
    policy, _, _ = loss_of("ppo", rows, 0.2, 0.3)
    sums = [policy.loss[row, : len(tokens)].sum().item() for row, (_, tokens) in enumerate(rows)]
    assert float(loss) == pytest.approx(sum(sums) / len(rows) / 6, abs=1e-6)


@quick
@given(rows=responses, low=clip, high=clip)
def test_where_the_policy_has_not_moved_every_loss_has_the_policy_gradient(
    rows: Responses, low: float, high: float
) -> None:
    rows = [(advantage, [(old, old) for old, _ in tokens]) for advantage, tokens in rows]
    for name, mode in OWN_AGGREGATION.items():
        policy, _, gradient = loss_of(name, rows, low, high)
        _, _, advantages, mask = columns(rows)
        weights = token_weights(mask, mode, Denominators(float(mask.sum()), float(len(rows))), 6)
        torch.testing.assert_close(gradient, -weights.double() * advantages, msg=name)
        assert not policy.clipped.any() and not policy.approx_kl.any()


def test_a_diverged_token_stays_finite_in_every_loss() -> None:
    rows = [(advantage, [(-0.5, value)]) for advantage in (0.0, 1.0, -1.0) for value in (500.0, -500.0)]
    for name in OWN_AGGREGATION:
        _, loss, gradient = loss_of(name, rows, 0.2, 0.2)
        assert loss.isfinite() and gradient.isfinite().all(), name
