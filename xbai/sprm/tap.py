"""Reading one hidden layer out of a transformers model, without keeping all of them."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from xbai.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float


class HiddenStateTap:
    """While open, captures the residual stream after decoder layer L-2 (`hidden_states[-2]`) of each forward pass.

    Works on a transformers causal LM or its backbone; the tensor keeps its autograd graph.
    """

    def __init__(self, model: nn.Module) -> None:
        backbone = getattr(model, "model", model)
        layers = getattr(backbone, "layers", None)
        if layers is None or len(layers) < 2:
            raise UserError(f"{type(model).__name__}: the score head needs a decoder with at least two layers")
        self._layer = layers[-2]
        self._captured: Tensor | None = None

    def __enter__(self) -> HiddenStateTap:
        self._handle = self._layer.register_forward_hook(self._capture)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._handle.remove()
        self._captured = None

    def _capture(self, module: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        self._captured = output[0] if isinstance(output, tuple) else output

    def take(self) -> Float[Tensor, "batch time hidden"]:
        """The last forward pass's hidden state, handed over (a second call raises)."""
        if self._captured is None:
            raise RuntimeError("no forward pass ran since the last take()")
        captured, self._captured = self._captured, None
        return captured
