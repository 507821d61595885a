"""What a score head sees of whole responses: hidden states at their steps, by one pass of the causal LM over each."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from xbai.engine.files import LM_HEAD, read_config, resolve_dtype, resolve_head_dtype
from xbai.engine.float32_head import use_float32_output
from xbai.engine.packed_batch import PackedBatch
from xbai.engine.scorer import DEFAULT_MAX_BATCH_TOKENS, prepare_for_packing
from xbai.engine.weight_files import load_pretrained
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
        self._packs = prepare_for_packing(model)
        self._max_batch_tokens = max_batch_tokens or DEFAULT_MAX_BATCH_TOKENS[model.device.type]
        self._lm_head = _plain_lm_head(model)
        if self._lm_head is not None and resolve_head_dtype(None, model.dtype) != model.dtype:
            use_float32_output(self._lm_head)

    @classmethod
    def from_folder(
        cls,
        model_path: str | Path,
        layers: Sequence[int],
        *,
        dtype: str = "auto",
        max_batch_tokens: int | None = None,
        trust_remote_code: bool = False,
    ) -> FeatureExtractor:
        """Load a model onto the GPU where there is one.

        Raises:
            UserError: a folder without model, or one of another dtype's name.
        """
        from transformers import AutoModelForCausalLM

        config = read_config(model_path, trust_remote_code)
        model = load_pretrained(
            AutoModelForCausalLM,
            model_path,
            device="cuda" if torch.cuda.is_available() else "cpu",
            dtype=resolve_dtype(dtype, config),
            trust_remote_code=trust_remote_code,
        )
        return cls(model, layers, max_batch_tokens)

    def new_batch(self) -> FeatureBatch:
        """An empty batch, to be filled for `run`."""
        return FeatureBatch(self._max_batch_tokens if self._packs else 0)

    @torch.inference_mode()
    def run(self, batch: FeatureBatch) -> list[ExtractedResponse]:
        """What there is of each response of a batch, in the order in which they were added; on the CPU."""
        rows = zip(batch.packed.paths, batch.responses, strict=True)
        steps = [path[i] for path, response in rows for i in response.positions]
        captured: list[Tensor] = []
        index = torch.tensor(steps, dtype=torch.long, device=self.model.device)

        def capture(module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            captured.append((output[0] if isinstance(output, tuple) else output)[0, index])

        backbone = self.model.base_model
        with ExitStack() as hooks:
            for layer in sorted(self.layers):
                hooks.callback(backbone.layers[layer].register_forward_hook(capture).remove)
            inputs = batch.packed.inputs(self.model.device, self._packs)
            final = backbone(**inputs, use_cache=False).last_hidden_state[0]
        by_layer = dict(zip(sorted(self.layers), captured, strict=True))
        features = torch.stack([by_layer[layer] for layer in self.layers], dim=1).cpu()
        log_probs = self._mean_log_probs(final, batch)
        counts = [len(response.positions) for response in batch.responses]
        return list(map(ExtractedResponse, features.split(counts), log_probs))

    def _mean_log_probs(self, final: Tensor, batch: FeatureBatch) -> list[float]:
        """Of each response's tokens; the first token of a text has no log-prob, so none of an empty prompt."""
        counts = [len(response.ids) - max(response.start, 1) for response in batch.responses]
        if (lm_head := self._lm_head) is None:
            return [float("nan")] * len(counts)
        predictors: list[int] = []
        labels: list[int] = []
        for path, response in zip(batch.packed.paths, batch.responses, strict=True):
            first = max(response.start, 1)
            predictors += path[first - 1 : len(response.ids) - 1]
            labels += response.ids[first:]
        places, targets = (torch.tensor(values, dtype=torch.long).to(final.device) for values in (predictors, labels))
        chunk = max(1, LOGITS_PER_CHUNK // lm_head.out_features)
        found = torch.cat(
            [
                _log_probs(lm_head(final[place]).float(), target)
                for place, target in zip(places.split(chunk), targets.split(chunk), strict=True)
            ]
        )
        return [float(part.double().mean()) for part in found.cpu().split(counts)]


def _log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(-1, labels[:, None]).squeeze(-1) - logits.logsumexp(-1)


class FeatureBatch:
    """Responses for one forward pass.

    Args:
        max_tokens: most tokens, see `PackedBatch`.
    """

    def __init__(self, max_tokens: int) -> None:
        self.packed = PackedBatch(max_tokens)
        self.responses: list[EncodedResponse] = []

    def add(self, response: EncodedResponse) -> bool:
        """Take a response; False where the batch is too full for it."""
        if not self.packed.add(response.ids):
            return False
        self.responses.append(response)
        return True


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
