"""Training a linear layer in the coordinates of standardised inputs, although it is stored for plain ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class StandardizedLayer:
    """W x + b, trained as V z + c of z = (x - mean) / deviation: V = W * deviation, c = b + W mean.

    To Adam, which moves all weights about as far, a coordinate a thousand times as large as others is a thousand times
    as important: a first update through it throws all logits to one side. In coordinates of z all count alike.

    Args:
        layer: plain, or sharded by rows, bias and weight alike.
        mean, deviation: [in] float64 of the inputs.
    """

    def __init__(self, layer: nn.Linear, mean: Tensor, deviation: Tensor) -> None:
        self._layer, self.mean, self.deviation = layer, mean, deviation

    @torch.no_grad()
    def transform_gradient(self) -> None:
        """Make the gradients of W and b those of V and c, in place."""
        weight, bias = (_shard(parameter.grad) for parameter in (self._layer.weight, self._layer.bias))
        mean, deviation = self._vectors(weight.device)
        weight.copy_((weight.double() - bias.double()[:, None] * mean) / deviation)

    @contextmanager
    def coordinates(self) -> Iterator[None]:
        """Inside, the layer's parameters hold V and c."""
        weight, bias = (_shard(parameter.detach()) for parameter in (self._layer.weight, self._layer.bias))
        mean, deviation = self._vectors(weight.device)
        bias.add_(weight.double() @ mean)
        weight.mul_(deviation)
        try:
            yield
        finally:
            weight.div_(deviation)
            bias.sub_(weight.double() @ mean)

    def _vectors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return self.mean.to(device), self.deviation.to(device)


def _shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
