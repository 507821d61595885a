"""The algorithms against plain Python, token by token."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ppo_defaults
from torch import Tensor

from verl.trainer.config.schema import AlgorithmConfig, KLControl, LossAggMode
from verl.trainer.ppo.core_algos import (
    KL_ESTIMATORS,
    Denominators,
    KLController,
    compute_advantages,
    compute_gae_advantage,
    compute_grpo_outcome_advantage,
    compute_reinforce_plus_plus_advantage,
    compute_remax_outcome_advantage,
    compute_rloo_outcome_advantage,
    compute_value_loss,
    kl_loss,
    kl_penalty,
    token_weights,
)

rewards = st.floats(-2, 2, width=32)
outcomes = st.lists(st.tuples(st.sampled_from("abc"), rewards, st.booleans()), min_size=1, max_size=12)
quick = settings(max_examples=50, deadline=None)


def columns(rows: list[tuple[str, float, bool]]) -> tuple[list[str], Tensor, Tensor]:
    uids, values, graded = zip(*rows)
    return list(uids), torch.tensor(values), torch.tensor(graded)


def peers(rows: list[tuple[str, float, bool]], uid: str) -> list[float]:
    return [reward for other, reward, graded in rows if other == uid and graded]


@quick
@given(rows=outcomes, norm_by_std=st.booleans())
def test_grpo(rows: list[tuple[str, float, bool]], norm_by_std: bool) -> None:
    uids, values, graded = columns(rows)
    got = compute_grpo_outcome_advantage(values, uids, graded, norm_by_std, eps=1e-3)
    expected = []
    for uid, reward, is_graded in rows:
        group = peers(rows, uid)
        std = statistics.stdev(group) if len(group) > 1 else 0.0
        advantage = reward - statistics.fmean(group) if is_graded else 0.0
        expected.append(advantage / (std + 1e-3) if norm_by_std else advantage)
    assert got.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-3)


@quick
@given(rows=outcomes)
def test_rloo(rows: list[tuple[str, float, bool]]) -> None:
    uids, values, graded = columns(rows)
    expected = []
    for uid, reward, is_graded in rows:
        group = peers(rows, uid)
        others = (sum(group) - reward) / (len(group) - 1) if is_graded and len(group) > 1 else reward
        expected.append(reward - others if is_graded else 0.0)
    got = compute_rloo_outcome_advantage(values, uids, graded)
    assert got.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_remax() -> None:
    graded = torch.tensor([True, True, False])
    got = compute_remax_outcome_advantage(torch.tensor([1.0, 0, 1]), torch.tensor([0.5, 1, 0]), graded)
    assert got.tolist() == [0.5, -1, 0]


def token_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    mask = torch.arange(6) < torch.tensor([[6], [2], [4], [1]])
    return torch.randn(4, 6), torch.randn(4, 6), mask, torch.tensor([True, True, False, True])


def plain_whiten(rows: dict[int, list[float]]) -> dict[int, list[float]]:
    flat = [value for row in rows.values() for value in row]
    mean, std = statistics.fmean(flat), statistics.stdev(flat)
    return {row: [(value - mean) / std for value in values] for row, values in rows.items()}


def assert_rows(got: Tensor, expected: dict[int, list[float]]) -> None:
    for row in range(len(got)):
        values = expected.get(row, [])
        padded = values + [0.0] * (got.shape[1] - len(values))
        assert got[row].tolist() == pytest.approx(padded, rel=1e-4, abs=1e-5)


def test_reinforce_plus_plus() -> None:
    token_rewards, _, mask, graded = token_batch()
    expected = {}
    for row in (0, 1, 3):
        kept = token_rewards[row, mask[row]].tolist()
        expected[row] = [sum(0.9**k * r for k, r in enumerate(kept[t:])) for t in range(len(kept))]
    advantages, returns = compute_reinforce_plus_plus_advantage(token_rewards, mask, graded, gamma=0.9)
    assert_rows(returns, expected)
    assert_rows(advantages, plain_whiten(expected))


def test_gae() -> None:
    token_rewards, values, mask, graded = token_batch()
    gamma, lam = 0.9, 0.8
    advantages, returns = {}, {}
    for row in (0, 1, 3):
        r, v = token_rewards[row, mask[row]].tolist(), [*values[row, mask[row]].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        advantages[row] = [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(r))]
        returns[row] = [a + b for a, b in zip(advantages[row], v)]
    got_advantages, got_returns = compute_gae_advantage(token_rewards, values, mask, graded, gamma, lam)
    assert_rows(got_returns, returns)
    assert_rows(got_advantages, plain_whiten(advantages))


@pytest.mark.parametrize("name", get_args(get_type_hints(AlgorithmConfig)["adv_estimator"]))
def test_every_estimator_leaves_padding_and_ungraded_rows_alone(name: str) -> None:
    token_rewards, values, mask, graded = token_batch()
    columns = {"token_level_rewards": token_rewards * mask, "response_mask": mask, "graded": graded}
    columns |= {"values": values, "baselines": torch.zeros(4)}
    algorithm = ppo_defaults(f"algorithm.adv_estimator={name}").algorithm
    advantages, returns = compute_advantages(columns, ["a", "a", "a", "b"], algorithm)
    for tensor in (advantages, returns):
        assert tensor.shape == mask.shape
        assert not tensor[~mask].any()
        assert not tensor[2].any()
    assert advantages[0].any()


@quick
@given(
    tokens=st.lists(st.tuples(rewards, rewards, rewards), min_size=1, max_size=8),
    clip=st.floats(0.1, 1.0),
)
def test_value_loss(tokens: list[tuple[float, float, float]], clip: float) -> None:
    values, old, returns = (torch.tensor(column, dtype=torch.float64) for column in zip(*tokens))
    got = compute_value_loss(values, old, returns, clip)
    expected, clipped = [], []
    for value, old_value, target in tokens:
        held = min(max(value, old_value - clip), old_value + clip)
        expected.append(max((value - target) ** 2, (held - target) ** 2) / 2)
        clipped.append((held - target) ** 2 > (value - target) ** 2)
    assert got.loss.tolist() == pytest.approx(expected, abs=1e-12)
    assert got.clipped.tolist() == clipped


def test_a_value_that_left_the_range_for_the_better_gets_no_gradient() -> None:
    values = torch.tensor([1.0, -1.0], requires_grad=True)
    compute_value_loss(values, torch.zeros(2), torch.full((2,), 2.0), clip=0.5).loss.sum().backward()
    assert values.grad.tolist() == [0.0, -3.0]


@pytest.mark.parametrize("mode", get_args(LossAggMode))
def test_loss_aggregation_adds_up_over_micro_batches(mode: str) -> None:
    loss_mat, _, mask, _ = token_batch()
    rows = [loss_mat[row, mask[row]].tolist() for row in range(4)]
    expected = {
        "token-mean": sum(map(sum, rows)) / sum(map(len, rows)),
        "seq-mean-token-sum": sum(map(sum, rows)) / 4,
        "seq-mean-token-mean": sum(sum(row) / len(row) for row in rows) / 4,
        "seq-mean-token-sum-norm": sum(map(sum, rows)) / 4 / 7,
    }[mode]
    totals = Denominators(tokens=float(mask.sum()), sequences=4.0)
    weights = [token_weights(mask[rows], mode, totals, max_length=7) for rows in (slice(0, 1), slice(1, 4))]
    assert not torch.cat(weights)[~mask].any()
    shares = [(part * loss_mat[rows]).sum() for part, rows in zip(weights, (slice(0, 1), slice(1, 4)))]
    assert float(sum(shares)) == pytest.approx(expected, rel=1e-5)


@quick
@given(rows=outcomes)
def test_advantages_of_a_prompt_add_up_to_nothing(rows: list[tuple[str, float, bool]]) -> None:
    uids, values, graded = columns(rows)
    for got in (
        compute_grpo_outcome_advantage(values, uids, graded),
        compute_grpo_outcome_advantage(values, uids, graded, norm_by_std=False),
        compute_rloo_outcome_advantage(values, uids, graded),
    ):
        for uid in set(uids):
            assert float(got[[other == uid for other in uids]].sum()) == pytest.approx(0.0, abs=1e-3)


def test_gae_without_decay_is_return_less_value_and_without_trace_the_one_step_error() -> None:
    token_rewards, values, mask, graded = token_batch()
    _, returns = compute_gae_advantage(token_rewards, values, mask, graded, gamma=1.0, lam=1.0)
    kept = mask & graded[:, None]
    expected = (token_rewards * kept).flip(1).cumsum(1).flip(1) * kept
    torch.testing.assert_close(returns, expected, atol=1e-5, rtol=1e-5)
    _, returns = compute_gae_advantage(token_rewards, values, mask, graded, gamma=0.5, lam=0.0)
    following = torch.cat([(values * kept)[:, 1:], torch.zeros(4, 1)], dim=1)
    torch.testing.assert_close(returns, (token_rewards + 0.5 * following) * kept, atol=1e-5, rtol=1e-5)


@quick
@given(st.floats(-5, 0), st.floats(-5, 0))
def test_kl_estimates(log_prob: float, ref_log_prob: float) -> None:
    log_ratio = log_prob - ref_log_prob
    expected = {
        "kl": log_ratio,
        "abs": abs(log_ratio),
        "mse": 0.5 * log_ratio**2,
        "low_var_kl": min(math.exp(-log_ratio) - 1 + log_ratio, 10.0),
    }
    aliases = {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}
    for kind, value in (expected | {alias: expected[kind] for alias, kind in aliases.items()}).items():
        tensors = torch.tensor([log_prob], dtype=torch.float64), torch.tensor([ref_log_prob], dtype=torch.float64)
        assert float(kl_penalty(*tensors, kind)) == pytest.approx(value, abs=1e-9)


def gradient_of(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """[vocabulary], for a policy of these logits."""
    logits = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits.log_softmax(-1)), logits)
    return gradient


def expected(kl: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Over the policy's own tokens, which are drawn: no gradient goes through their probabilities."""
    return lambda log_probs: (log_probs.exp().detach() * kl(log_probs)).sum()


@quick
@given(st.integers(0, 10_000))
def test_expected_gradients_of_the_kl_losses(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, ref_logits = torch.randn(2, 9, dtype=torch.float64, generator=generator).mul(0.5)
    ref = ref_logits.log_softmax(-1)
    kl = gradient_of(lambda log_probs: (log_probs.exp() * (log_probs - ref)).sum(), logits)
    reverse = gradient_of(lambda log_probs: (ref.exp() * (ref - log_probs)).sum(), logits)
    distance = gradient_of(lambda log_probs: (log_probs.exp() - ref.exp()).abs().sum(), logits)
    assert kl.abs().max() > 1e-3
    exact = {"mse": kl, "k2": kl, "low_var_kl": reverse, "k3": reverse, "abs": distance}
    assert exact.keys() == KL_ESTIMATORS.keys() - {"kl", "k1"}
    exact |= {f"{kind}+": kl for kind in KL_ESTIMATORS}
    for kind, gradient in exact.items():
        found = gradient_of(expected(lambda log_probs, kind=kind: kl_loss(log_probs, ref, kind)), logits)
        torch.testing.assert_close(found, gradient, atol=1e-14, rtol=0)
        value = kl_loss(logits.log_softmax(-1), ref, kind)
        assert torch.equal(value, kl_penalty(logits.log_softmax(-1), ref, kind.removesuffix("+")))
    assert gradient_of(expected(lambda log_probs: KL_ESTIMATORS["kl"](log_probs - ref)), logits).abs().max() < 1e-15


def test_where_low_var_kl_is_cut_off_it_has_no_gradient_and_with_a_plus_it_has() -> None:
    log_probs = torch.tensor([-8.0, -1.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-2.0, -1.5], dtype=torch.float64)
    for kind, gradients in (("low_var_kl", [0.0, 1 - math.exp(-0.5)]), ("low_var_kl+", [-6.0, 0.5])):
        value = kl_loss(log_probs, ref, kind)
        assert value.tolist() == pytest.approx([10.0, math.exp(-0.5) - 1 + 0.5])
        (found,) = torch.autograd.grad(value.sum(), log_probs)
        assert found.tolist() == pytest.approx(gradients)


def test_kl_controllers() -> None:
    fixed = KLController(KLControl(type="fixed", kl_coef=0.1, target_kl=1.0, horizon=1000))
    fixed.update(5.0, 100)
    assert fixed.value == 0.1
    adaptive = KLController(KLControl(type="adaptive", kl_coef=0.1, target_kl=1.0, horizon=1000))
    adaptive.update(1.1, 100)
    assert adaptive.value == pytest.approx(0.1 * (1 + 0.1 * 100 / 1000))
    adaptive.update(0.0, 100)
    assert adaptive.value == pytest.approx(0.1 * 1.01 * (1 - 0.2 * 100 / 1000))
