"""Training in standardised coordinates is training on standardised inputs, whatever the layer is stored for."""

import copy

import torch
from torch import nn

from verl.utils.standardized_layer import StandardizedLayer

MEAN = torch.tensor([900.0, 0.1, -3.0], dtype=torch.float64)
DEVIATION = torch.tensor([20.0, 0.02, 1.0], dtype=torch.float64)


def train(layer: nn.Linear, inputs: torch.Tensor, targets: torch.Tensor, standardized: StandardizedLayer | None):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (layer(inputs) - targets).square().mean().backward()
        if standardized is None:
            optimizer.step()
        else:
            standardized.transform_gradient()
            with standardized.coordinates():
                optimizer.step()


def test_it_is_training_on_standardised_inputs():
    torch.manual_seed(0)
    z = torch.randn(64, 3)
    x, targets = (MEAN + DEVIATION * z).float(), torch.randn(64, 2)
    plain = nn.Linear(3, 2)
    stored = copy.deepcopy(plain)
    with torch.no_grad():
        stored.weight.div_(DEVIATION)
        stored.bias.sub_(stored.weight.double() @ MEAN)
    torch.testing.assert_close(stored(x), plain(z), rtol=1e-4, atol=1e-4)
    train(plain, ((x - MEAN) / DEVIATION).float(), targets, None)
    train(stored, x, targets, StandardizedLayer(stored, MEAN, DEVIATION))
    torch.testing.assert_close(stored(x), plain(z), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close((stored.weight * DEVIATION).float(), plain.weight, rtol=1e-3, atol=1e-3)
