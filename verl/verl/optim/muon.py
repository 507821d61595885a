"""Muon: momentum made orthogonal, for the matrices of a model, whether plain or sharded by FSDP2."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
NOT_HIDDEN = ("embed_tokens", "lm_head")


class Muon(torch.optim.Optimizer):
    """Muon on the weight matrices of hidden layers, AdamW on embeddings, LM head, norms and biases.

    `torch.optim.Muon` would multiply sharded matrices through some fifteen collectives each; here a matrix is gathered
    once, every rank orthogonalises the whole and keeps its shard. For models whose matrices fit one rank. After Keller
    Jordan, https://kellerjordan.github.io/posts/muon/.

    Args:
        lr: of the matrices; a tall one's is scaled by the root of its aspect ratio.
        adamw_lr: of everything else.
        betas: of AdamW.
        weight_decay: of the matrices, decoupled; everything else has none.
        momentum: of the matrices.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        adamw_lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        matrices, others = list[nn.Parameter](), list[nn.Parameter]()
        for name, parameter in named_parameters:
            is_hidden_matrix = parameter.dim() == 2 and not any(part in name for part in NOT_HIDDEN)
            (matrices if is_hidden_matrix else others).append(parameter)
        groups = [
            {"params": matrices, "orthogonal": True, "lr": lr, "weight_decay": weight_decay},
            {"params": others, "orthogonal": False, "lr": adamw_lr, "weight_decay": 0.0},
        ]
        super().__init__([group for group in groups if group["params"]], {"betas": betas, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # Nothing here passes closures.
        """Update every parameter that has a gradient. A collective where parameters are sharded."""
        for group in self.param_groups:
            update = self._muon_update if group["orthogonal"] else self._adam_update
            for parameter in group["params"]:
                if parameter.grad is not None:
                    direction = update(parameter, parameter.grad, group)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction, alpha=-group["lr"])

    def _muon_update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state, momentum = self.state[parameter], group["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        rows, columns = parameter.shape
        return _on_whole(gradient.lerp(average, momentum)) * max(1.0, rows / columns) ** 0.5

    def _adam_update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step = state["step"].item()
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1) / (1 - beta1**step)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2) / (1 - beta2**step)
        return mean / (square.sqrt() + 1e-8)


def _on_whole(matrix: Tensor) -> Tensor:
    if not isinstance(matrix, DTensor):
        return orthogonalized(matrix)
    whole = orthogonalized(matrix.full_tensor())
    return distribute_tensor(whole, matrix.device_mesh, matrix.placements, src_data_rank=None)


def orthogonalized(matrix: Tensor) -> Tensor:
    """About the nearest matrix with orthonormal rows or columns: singular values go to 0.7..1.2, vectors stay."""
    a, b, c = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix).bfloat16()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if is_tall else x).to(matrix.dtype)
