"""Chunked log-probs against the plain formula, and the trimming of padding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from verl.models.log_probs import FinalStates, LMHead, masked_sum, token_log_probs
from verl.models.packing import trim_padding


@pytest.mark.parametrize("tokens_per_chunk", [1, 4, 100])
def test_chunks_are_exact_in_values_and_gradients(tokens_per_chunk: int) -> None:
    torch.manual_seed(0)
    lm_head = nn.Linear(8, 11, bias=False, dtype=torch.float64)
    hidden = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(0, 11, (2, 5)), torch.randn(2, 2, 5, dtype=torch.float64)

    log_softmax = (lm_head(hidden) / 0.7).log_softmax(-1)
    plain = log_softmax.gather(-1, labels[..., None]).squeeze(-1), -(log_softmax.exp() * log_softmax).sum(-1)
    chunked = token_log_probs(
        hidden,
        LMHead.of(lm_head),
        labels,
        temperature=0.7,
        compute_entropy=True,
        logits_per_chunk=11 * tokens_per_chunk,
    )
    for ours, theirs in zip(chunked, plain):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)

    def gradients(pair: tuple) -> tuple:
        return torch.autograd.grad(sum((w * p).sum() for w, p in zip(weights, pair)), (hidden, lm_head.weight))

    for ours, theirs in zip(gradients(chunked), gradients(plain)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens_per_chunk", [1, 4, 100])
@pytest.mark.parametrize("vocabulary", [2, 11])
def test_kl_over_the_whole_vocabulary_is_torchs(vocabulary: int, tokens_per_chunk: int) -> None:
    torch.manual_seed(0)
    lm_head, other_head = (nn.Linear(8, vocabulary, bias=False, dtype=torch.float64) for _ in range(2))
    hidden, other = (torch.randn(10, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    labels, weights = torch.randint(0, vocabulary, (10,)), torch.randn(10, dtype=torch.float64)
    result = token_log_probs(
        hidden,
        LMHead.of(lm_head),
        labels,
        temperature=0.7,
        reference=FinalStates(other, LMHead.of(other_head)),
        logits_per_chunk=2 * vocabulary * tokens_per_chunk,
    )
    policy = (lm_head(hidden) / 0.7).log_softmax(-1)
    reference = (other_head(other) / 0.7).log_softmax(-1).detach()
    expected = nn.functional.kl_div(reference, policy, reduction="none", log_target=True).sum(-1)
    assert result.entropy is None
    torch.testing.assert_close(result.log_probs, policy.gather(-1, labels[:, None]).squeeze(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.kl, expected, rtol=1e-12, atol=1e-12)

    def gradients(kl: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((weights * kl).sum(), (hidden, lm_head.weight), retain_graph=True)

    for ours, theirs in zip(gradients(result.kl), gradients(expected)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    (weights * result.kl).sum().backward()
    assert other.grad is None and other_head.weight.grad is None, "the reference is frozen"


def test_no_more_logits_than_allowed_ever_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    logits_of = LMHead.logits

    def counted(self: LMHead, hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden) * self.vocab_size)
        return logits_of(self, hidden)

    monkeypatch.setattr(LMHead, "logits", counted)
    lm_head = LMHead.of(nn.Linear(8, 11))
    hidden = torch.randn(3, 7, 8, requires_grad=True)
    log_probs, entropy, _ = token_log_probs(hidden, lm_head, torch.zeros(3, 7).long(), logits_per_chunk=50)
    log_probs.sum().backward()
    assert entropy is None
    assert len(sizes) == 2 * 6, "each chunk once forward and once more in the backward pass"
    assert max(sizes) <= 50

    sizes.clear()
    token_log_probs(
        hidden,
        lm_head,
        torch.zeros(3, 7).long(),
        reference=FinalStates(hidden.flatten(0, 1), lm_head),
        logits_per_chunk=50,
    )
    assert max(a + b for a, b in zip(sizes[::2], sizes[1::2])) <= 50, "the reference's logits count"


@pytest.mark.parametrize("has_bias", [False, True])
def test_logits_of_16_bit_products_are_exact_in_float32(has_bias: bool) -> None:
    torch.manual_seed(0)
    linear, hidden = nn.Linear(64, 301, bias=has_bias).bfloat16(), torch.randn(9, 64).bfloat16()
    exact = nn.functional.linear(hidden.double(), linear.weight.double(), linear.bias.double() if has_bias else None)
    rounded, kept = (LMHead.of(linear, dtype).logits(hidden) for dtype in (None, torch.float32))
    assert (rounded.dtype, kept.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(kept.double(), exact, rtol=1e-5, atol=1e-5)
    assert (rounded.double() - exact).abs().max() > 1e-3


@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
def test_a_bfloat16_heads_gradient_does_not_depend_on_the_chunks(logits_dtype: torch.dtype | None) -> None:
    """Labels as the model samples them, advantages of both signs: sums in which much cancels."""
    torch.manual_seed(0)
    linear, hidden = nn.Linear(32, 97).bfloat16(), torch.randn(2000, 32).bfloat16()
    labels = torch.distributions.Categorical(logits=linear(hidden).float()).sample()
    advantages = torch.randn(2000)

    def gradient(linear: nn.Linear, hidden: torch.Tensor, tokens_per_chunk: int) -> tuple[torch.Tensor, ...]:
        head = LMHead.of(linear, logits_dtype and torch.promote_types(logits_dtype, linear.weight.dtype))
        result = token_log_probs(hidden, head, labels, logits_per_chunk=97 * tokens_per_chunk)
        return torch.autograd.grad((result.log_probs * advantages).sum(), (linear.weight, linear.bias))

    exact = gradient(linear.double(), hidden.double(), 2000)
    linear = linear.bfloat16()
    whole, chunked = gradient(linear, hidden, 2000), gradient(linear, hidden, 7)
    for in_one, in_many, reference in zip(whole, chunked, exact):
        assert in_one.dtype == torch.bfloat16
        errors = [float((value.double() - reference).norm() / reference.norm()) for value in (in_one, in_many)]
        assert max(errors) < 0.005, "two roundings: of the logits' gradients, and of the sum"
        assert errors[1] < 1.1 * errors[0]


def test_masked_sum_ignores_what_is_off_the_mask() -> None:
    values = torch.tensor([1.0, float("nan"), float("inf")], requires_grad=True)
    total = masked_sum(values, torch.tensor([1, 0, 0]))
    total.backward()
    assert float(total.detach()) == 1.0
    assert values.grad.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["0011 1000", "0111 1100"], (1, 2)),
        (["1111 1111"], (0, 0)),
        (["0001 1000"], (3, 3)),
        (["0000 0000"], (3, 3)),
    ],
)
def test_trim_padding(rows: list[str], expected: tuple[int, int]) -> None:
    mask = torch.tensor([[int(bit) for bit in row.replace(" ", "")] for row in rows])
    assert trim_padding(mask, response_length=4) == expected
