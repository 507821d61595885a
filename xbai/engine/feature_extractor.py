"""What a score head sees of whole responses: hidden states at their steps, by one pass of the causal LM over each."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from xbai.engine.files import LM_HEAD, resolve_head_dtype
from xbai.engine.linear import use_float32_output
from xbai.engine.packed_batch import PackedBatch
from xbai.engine.scorer import prepare_for_packing
from xbai.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

LOGITS_PER_CHUNK = 2**27
"""Logits held at once: 512 MiB in float32."""
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings of models whose logits are not what the LM head gives."""


@dataclass(frozen=True)
class EncodedResponse:
    """A response with its prompt, as tokens.

    Attributes:
        ids: of both.
        start: where the response begins.
        positions: of the features of its steps, from `step_feature_mask`.
    """

    ids: Sequence[int]
    start: int
    positions: Sequence[int]


@dataclass(frozen=True)
class ExtractedResponse:
    """Of one response.

    Attributes:
        features: [steps, layers, c] in the model's dtype.
        mean_log_prob: of its tokens at temperature 1; nan where it has none.
    """

    features: Tensor
    mean_log_prob: float


class FeatureExtractor:
    """Runs batches of responses through a causal LM, without padding, their common beginnings once.

    Args:
        model: from now on the extractor's own.
        layers: decoder layers, counted from 0, after which the residual stream is read.
        max_batch_tokens: most tokens of one forward pass, a longer response runs alone; None for what suits the device.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], max_batch_tokens: int | None = None) -> None:
        self.model = model.eval()
        self.layers = tuple(layers)
        self._max_batch_tokens = prepare_for_packing(model, max_batch_tokens)
        self._lm_head = _plain_lm_head(model)
        if self._lm_head is not None and resolve_head_dtype(None, model.dtype) != model.dtype:
            use_float32_output(self._lm_head)

    def new_batch(self) -> PackedBatch:
        """An empty batch, to be filled for `run`."""
        return PackedBatch(self._max_batch_tokens)

    @torch.inference_mode()
    def run(self, batch: PackedBatch, responses: Sequence[EncodedResponse]) -> list[ExtractedResponse]:
        """What there is, on the CPU, of each response of a batch: of those whose `ids` it was given, in that order."""
        captured: list[Tensor] = []
        index = batch.places(response.positions for response in responses).to(self.model.device)

        def capture(module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            captured.append((output[0] if isinstance(output, tuple) else output)[0, index])

        backbone = self.model.base_model
        with ExitStack() as hooks:
            for layer in sorted(self.layers):
                hooks.callback(backbone.layers[layer].register_forward_hook(capture).remove)
            final = backbone(**batch.inputs(self.model.device), use_cache=False).last_hidden_state[0]
        by_layer = dict(zip(sorted(self.layers), captured, strict=True))
        features = torch.stack([by_layer[layer] for layer in self.layers], dim=1).cpu()
        log_probs = self._mean_log_probs(final, batch, responses)
        counts = [len(response.positions) for response in responses]
        return list(map(ExtractedResponse, features.split(counts), log_probs))

    def _mean_log_probs(self, final: Tensor, batch: PackedBatch, responses: Sequence[EncodedResponse]) -> list[float]:
        """Of each response's tokens; the first token of a text has no log-prob, so none of an empty prompt."""
        if (lm_head := self._lm_head) is None:
            return [float("nan")] * len(responses)
        labels = [response.ids[max(response.start, 1) :] for response in responses]
        counts = [len(ids) for ids in labels]
        ends = [len(response.ids) - 1 for response in responses]
        places = batch.places(range(end - count, end) for end, count in zip(ends, counts, strict=True))
        flat = torch.tensor(list(chain.from_iterable(labels)), dtype=torch.long)
        chunk = max(1, LOGITS_PER_CHUNK // lm_head.out_features)
        chunks = zip(*(values.to(final.device).split(chunk) for values in (places, flat)), strict=True)
        found = torch.cat([_log_probs(lm_head(final[place]).float(), target) for place, target in chunks])
        return [float(part.double().mean()) for part in found.cpu().split(counts)]


def _log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(-1, labels[:, None]).squeeze(-1) - logits.logsumexp(-1)


def resolve_layers(layers: Sequence[int] | None, layer_count: int) -> tuple[int, ...]:
    """The decoder layers to read: what was asked for, else the one before the last, which the published head reads.

    Raises:
        UserError: a layer that the model does not have, or one twice.
    """
    if layer_count < 2:
        raise UserError("the score head needs a decoder with at least two layers (num_hidden_layers in config.json)")
    if layers is None:
        return (layer_count - 2,)
    wrong = [layer for layer in layers if not 0 <= layer < layer_count]
    if wrong or not layers or len(set(layers)) < len(layers):
        raise UserError(
            f"--layers {','.join(map(str, layers))}: different numbers from 0 to {layer_count - 1}, the decoder layers"
        )
    return tuple(layers)


def _plain_lm_head(model: PreTrainedModel) -> nn.Linear | None:
    head = model.get_output_embeddings()
    changes = [name for name in LOGIT_CHANGES if getattr(model.config, name, None) not in (None, 1.0)]
    if isinstance(head, nn.Linear) and not changes:
        return head
    logger.warning(
        "%s: no log-probs beside the features, its logits are not what %s gives (%s)",
        type(model).__name__, LM_HEAD, ", ".join(changes) or "no linear layer",
    )  # fmt: skip
    return None
