"""The critic: a transformers backbone without LM head, and a linear value head on its last hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from verl.models.loading import TransformerOptions, load_transformer
from verl.models.packing import TokenLayout

HEAD_SEED = 0


class ValueModel(nn.Module):
    """Values of the states from which each response token was sampled.

    Args:
        backbone: a transformers base model (its `.layers` are decoder layers).
        value_head: hidden size to 1.
    """

    def __init__(self, backbone: PreTrainedModel, value_head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.value_head = value_head

    def forward(self, layout: TokenLayout) -> Tensor:
        """[M] float32 values before each response token of `layout`; float64 for a float64 model."""
        hidden = self.backbone(**layout.backbone_inputs, use_cache=False).last_hidden_state
        # Without a single token the head still runs, on zero rows: every rank reduces its gradients alike.
        return layout.each_token(self.value_head(hidden.flatten(0, -2)[layout.predictors]).squeeze(-1))


def build_value_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    **options: Unpack[TransformerOptions],
) -> ValueModel:
    """Load the backbone of a Hugging Face folder, on the CPU, and put a fresh value head on it, alike on every rank.

    Args:
        path: model folder, of a causal LM (whose LM head is not loaded) or of a base model.
        dtype: of the backbone's weights; the head is float32.
        options: see `load_transformer`.

    Raises:
        UserError: no such folder, no model in it, or one that cannot compute packed sequences.
    """
    backbone = load_transformer(AutoModel, path, dtype, **options)
    return ValueModel(backbone, _fresh_head(backbone.config.hidden_size))


def _fresh_head(hidden_size: int) -> nn.Linear:
    """Values start small beside rewards of about 1, whatever the scale of the hidden states."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(HEAD_SEED)
        head = nn.Linear(hidden_size, 1)
        nn.init.normal_(head.weight, std=1 / (hidden_size + 1))
        nn.init.zeros_(head.bias)
    return head
