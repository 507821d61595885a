"""vLLM's models with the score head in their forward pass; to be imported on demand, like vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.sequence import IntermediateTensors

from xbai.engine.fused_scores import FusedHead
from xbai.engine.scorer import HEAD_PREFIX

if TYPE_CHECKING:
    _CausalLM = Any  # The model of vLLM's that comes next in the order of inheritance.
else:
    _CausalLM = object


class FusedScores(_CausalLM):
    """Before a causal LM in the order of inheritance: scores the rows that tokens are sampled from.

    The hidden state that token t is sampled from is the one at t-1: what the head reads for a step that ends at t. No
    other row is scored, and no row needs to be mapped to a request: `step_logits` has the rows of the logits.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        # The stream between the last two layers, inside whatever is compiled or captured of the forward pass.
        self.set_aux_hidden_state_layers((config.num_hidden_layers - 1,))
        additional = vllm_config.additional_config
        assert isinstance(additional, dict), "as vLLM was told (fused_scores.py)"
        head = FusedHead.from_additional_config(additional)
        self.score_head = head.build(config.hidden_size).to(torch.get_default_device())
        self._features: Tensor | None = None

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states and features [tokens, 2c] side by side: vLLM hands on one tensor, of which it picks rows."""
        hidden, (features,) = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        return torch.cat([hidden, features], dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [rows, vocab] of `forward`'s rows, whose features wait for `step_logits`."""
        hidden, self._features = hidden_states.chunk(2, dim=-1)
        return super().compute_logits(hidden.contiguous())

    def step_logits(self) -> Tensor:
        """Step logits [rows] of the logits computed last."""
        return self.score_head(self._features)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load weights under their names in the checkpoint; a head that is not among them stays as it is."""
        head = {f"{HEAD_PREFIX}{name}" for name, _ in self.score_head.named_parameters()}
        return super().load_weights(weights) | head


class FusedLlamaForCausalLM(FusedScores, LlamaForCausalLM):
    """Llama."""


class FusedQwen2ForCausalLM(FusedScores, Qwen2ForCausalLM):
    """Qwen2."""


class FusedQwen3ForCausalLM(FusedScores, Qwen3ForCausalLM):
    """Qwen3."""
