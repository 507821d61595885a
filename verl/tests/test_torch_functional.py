"""Chunked log-probs against the plain formula, and the trimming of padding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from verl.utils.torch_functional import masked_sum, token_log_probs, trim_padding


@pytest.mark.parametrize("tokens_per_chunk", [1, 4, 100])
def test_chunks_are_exact_in_values_and_gradients(tokens_per_chunk: int) -> None:
    torch.manual_seed(0)
    lm_head = nn.Linear(8, 11, bias=False, dtype=torch.float64)
    hidden = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(0, 11, (2, 5)), torch.randn(2, 2, 5, dtype=torch.float64)

    log_softmax = (lm_head(hidden) / 0.7).log_softmax(-1)
    plain = log_softmax.gather(-1, labels[..., None]).squeeze(-1), -(log_softmax.exp() * log_softmax).sum(-1)
    chunked = token_log_probs(
        hidden, lm_head, labels, 11, temperature=0.7, compute_entropy=True, logits_per_chunk=11 * tokens_per_chunk
    )
    for ours, theirs in zip(chunked, plain):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)

    def gradients(pair: tuple) -> tuple:
        return torch.autograd.grad(sum((w * p).sum() for w, p in zip(weights, pair)), (hidden, lm_head.weight))

    for ours, theirs in zip(gradients(chunked), gradients(plain)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_no_more_logits_than_allowed_ever_exist() -> None:
    sizes: list[int] = []
    lm_head = nn.Linear(8, 11)
    lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    hidden = torch.randn(3, 7, 8, requires_grad=True)
    log_probs, entropy = token_log_probs(hidden, lm_head, torch.zeros(3, 7).long(), 11, logits_per_chunk=50)
    log_probs.sum().backward()
    assert entropy is None
    assert len(sizes) == 2 * 6, "each chunk once forward and once more in the backward pass"
    assert max(sizes) <= 50


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
