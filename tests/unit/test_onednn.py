"""Linear layers by oneDNN are the same linear layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xbai.engine.linear import use_onednn


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_products_are_those_of_the_weights_as_they_are_now(bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    features = torch.randn(1, 70, 24)
    use_onednn(layer)
    for _ in range(2):
        expected = features @ layer.weight.T + (layer.bias if bias else 0)
        torch.testing.assert_close(layer(features), expected, rtol=1e-5, atol=1e-5)
        layer.weight.mul_(-0.5)


def test_16_bits_stay_pytorchs() -> None:
    model = nn.Linear(4, 4).bfloat16()
    use_onednn(model)
    assert "forward" not in vars(model)
