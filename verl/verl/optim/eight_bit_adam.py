"""Adam whose moments take 8 bits each (torchao), on plain parameters and on the shards of FSDP2."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from verl.utils.compiler import check_compiler
from xbai.errors import UserError

EIGHT_BIT_OPTIMIZERS = ("AdamW8bit", "Adam8bit")
MOMENTS = ("exp_avg", "exp_avg_sq")


def check_eight_bit(name: str, device: str, key: str = "optim.name") -> None:
    """Raise a `UserError` where an 8-bit optimiser cannot run: without torchao, or a compiler for its kernels."""
    try:
        import torchao.optim  # noqa: F401 (optional, and slow to import)
    except ImportError as error:
        raise UserError(f"{key}={name} needs torchao (pip install 'torchao>=0.18,<0.19'); or use AdamW") from error
    check_compiler(f"{key}={name}", device)


class EightBitAdam(Optimizer):
    """torchao's optimiser on this rank's shards, with the state dict of Adam.

    torchao compiles its step for DTensors too, but then fails where ranks hold shards of different sizes; on plain
    shards it never sees them. Which moments are small enough to stay in 32 bits, it decides by the size of the shard,
    so its own state fits one number of ranks only. The state dict therefore has the moments in float32, as sharded as
    the parameters: it can be loaded on another number of ranks, and by AdamW.

    Args:
        name: one of `EIGHT_BIT_OPTIMIZERS`.
        options: `lr`, `betas` and `weight_decay`.
    """

    def __init__(self, name: str, parameters: Iterable[nn.Parameter], **options: Any) -> None:
        from torchao import optim

        # A checkpoint has the settings too; with AdamW's it can be loaded by either.
        super().__init__(parameters, torch.optim.AdamW([torch.empty(0)], **options).defaults)
        self._shards = {parameter: nn.Parameter(_shard(parameter)) for parameter in self.param_groups[0]["params"]}
        self._torchao: Any = getattr(optim, name)(list(self._shards.values()), **options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # Nothing here passes closures.
        """Update every parameter that has a gradient."""
        self._torchao.param_groups[0]["lr"].fill_(self.param_groups[0]["lr"])
        for parameter, shard in self._shards.items():
            # Offloading and loading give parameters other memory.
            shard.data = _shard(parameter)
            shard.grad = None if parameter.grad is None else _shard(parameter.grad)
            self._torchao.state[shard] = self.state[parameter]
        self._torchao.step()
        self._torchao.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """As Adam's."""
        saved = super().state_dict()
        parameters = self.param_groups[0]["params"]
        for index, state in saved["state"].items():
            saved["state"][index] = state | {moment: _as_float(state[moment], parameters[index]) for moment in MOMENTS}
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take Adam's state."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            for moment in MOMENTS:
                small = self._torchao._new_buffer(_shard(parameter), signed=moment == "exp_avg")
                state[moment] = small.copy_(_shard(state[moment]))


def _shard(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _as_float(moment: Tensor, parameter: nn.Parameter) -> Tensor:
    """A moment of this rank's shard in float32, laid out as its parameter is."""
    whole = torch.empty(moment.shape, device=moment.device).copy_(moment)
    if not isinstance(parameter, DTensor):
        return whole
    placed = DTensor.from_local(
        whole,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    # from_local moves it to the mesh's device, which with offload_policy is not the parameter's.
    return placed.to(parameter.device)
