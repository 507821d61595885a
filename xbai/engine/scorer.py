"""Step scores of whole sequences: the backbone without its last layer and LM head, and the score head on top."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from xbai.engine.files import load_tokenizer, quiet_transformers, read_config, resolve_dtype
from xbai.errors import UserError
from xbai.sprm import (
    ScoreHead,
    StepRule,
    load_score_head,
    load_sprm_config,
    step_feature_mask,
    trajectory_scores,
)

HEAD_PREFIX = "score_head."
BACKBONE_PREFIX = "model."
DEFAULT_MAX_BATCH_TOKENS = 16384


class PromptTooLong(UserError):  # noqa: N818 (a public name of the interface)
    """A sequence does not fit the model's context (HTTP 413 in the services)."""


@dataclass
class Scored:
    """Scores of one sequence.

    Attributes:
        value: the trajectory score (geometric mean), 0.0 without steps.
        step_scores: one sigmoid value in (0, 1) a step.
        token_ids: the scored sequence.
        positions: where in `token_ids` each step's feature was read (just before its step token).
    """

    value: float
    step_scores: list[float]
    token_ids: list[int]
    positions: list[int]


class Scorer:
    """Scores batches of sequences with one forward pass of L-1 decoder layers.

    Args:
        backbone: a decoder whose output is the residual stream after layer L-2 (see `truncate_backbone`).
        head: the score head.
        step_rule: which positions are steps.
        max_batch_tokens: most tokens, padding included, of one forward pass (a longer sequence runs alone).
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: ScoreHead,
        step_rule: StepRule,
        max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
    ) -> None:
        self.backbone = backbone.eval()
        self.device = next(backbone.parameters()).device
        self.head = head.to(self.device).eval()
        self.step_rule = step_rule
        self.max_batch_tokens = max_batch_tokens
        self.max_model_len: int = backbone.config.max_position_embeddings
        self._parameters = dict(backbone.named_parameters())

    @classmethod
    def from_folder(
        cls,
        model_path: str | Path,
        *,
        dtype: str = "auto",
        lang: str | None = None,
        device: str | torch.device | None = None,
        max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
        trust_remote_code: bool = False,
    ) -> Scorer:
        """Load a reflective model's folder; weights of the last layer and the LM head stay on disk.

        Raises:
            UserError: a folder without model, tokenizer or `score_module.pt`, or a head of another model.
        """
        from transformers import AutoModel

        config = read_config(model_path, trust_remote_code)
        sprm_config = load_sprm_config(model_path, load_tokenizer(model_path, trust_remote_code), lang)
        head = load_score_head(model_path, config.hidden_size, sprm_config)
        shortened = _without_last_layer(config)
        with quiet_transformers():
            backbone = AutoModel.from_pretrained(
                str(model_path),
                config=shortened,
                dtype=resolve_dtype(dtype, config),
                local_files_only=True,
                trust_remote_code=trust_remote_code,
            )
        backbone.norm = nn.Identity()
        backbone.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(backbone, head, sprm_config.step_rule, max_batch_tokens)

    @torch.inference_mode()
    def score(self, sequences: list[list[int]], response_starts: list[int]) -> list[Scored]:
        """Score whole sequences (prompt and response), in their order.

        Args:
            sequences: token ids, each at least one.
            response_starts: where each response begins (of a bare text: `xbai.sprm.split_response`).

        Raises:
            PromptTooLong: a sequence longer than the model's context.
            UserError: an empty sequence.
        """
        self._check_lengths(sequences)
        results: list[Scored | None] = [None] * len(sequences)
        for batch in self._batches([len(ids) for ids in sequences]):
            scored = self._score_batch([sequences[i] for i in batch], [response_starts[i] for i in batch])
            for index, result in zip(batch, scored, strict=True):
                results[index] = result
        return results

    @torch.no_grad()
    def load_weight(self, name: str, tensor: Tensor) -> None:
        """Copy one weight in under its Hugging Face name, the head's under `score_head.*`; others are not needed."""
        if name.startswith(HEAD_PREFIX):
            target = self.head.get_parameter(name.removeprefix(HEAD_PREFIX))
        else:
            target = self._parameters.get(name.removeprefix(BACKBONE_PREFIX))
        if target is not None:
            target.copy_(tensor)

    def _check_lengths(self, sequences: list[list[int]]) -> None:
        for ids in sequences:
            if not ids:
                raise UserError("score: a sequence needs at least one token")
            if len(ids) > self.max_model_len:
                raise PromptTooLong(
                    f"score: {len(ids)} tokens, but the model's context holds {self.max_model_len} "
                    "(max_position_embeddings in config.json)"
                )

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        batches: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lengths.__getitem__):
            if batches and (len(batches[-1]) + 1) * lengths[index] <= self.max_batch_tokens:
                batches[-1].append(index)
            else:
                batches.append([index])
        return batches

    def _score_batch(self, sequences: list[list[int]], response_starts: list[int]) -> list[Scored]:
        lengths = torch.tensor([len(ids) for ids in sequences])
        rows = [torch.tensor(ids) for ids in sequences]
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
        position = torch.arange(input_ids.shape[1])
        response_mask = (position >= torch.tensor(response_starts)[:, None]) & (position < lengths[:, None])
        mask = step_feature_mask(input_ids, response_mask.to(self.device), self.step_rule)
        # Padding stands on the right, where causal attention never looks: no attention mask, the fast kernel.
        hidden = self.backbone(input_ids=input_ids, use_cache=False).last_hidden_state
        step_logits = torch.zeros(mask.shape, device=self.device)
        step_logits[mask] = self.head(hidden[mask]).float()
        values = trajectory_scores(step_logits, mask).tolist()
        scores, mask = step_logits.sigmoid().cpu(), mask.cpu()
        return [
            Scored(value, row_scores[row_mask].tolist(), list(ids), row_mask.nonzero().flatten().tolist())
            for value, row_scores, row_mask, ids in zip(values, scores, mask, sequences, strict=True)
        ]


def truncate_backbone(backbone: nn.Module) -> nn.Module:
    """A view of a decoder without last layer and final norm; its parameters stay shared with `backbone`."""
    view = copy.copy(backbone)
    view._modules = dict(backbone._modules)
    view.config = _without_last_layer(backbone.config)
    view.layers = nn.ModuleList(backbone.layers[:-1])
    view.norm = nn.Identity()
    return view


def _without_last_layer(config):
    shortened = copy.deepcopy(config)
    if shortened.num_hidden_layers < 2:
        raise UserError("the score head needs a decoder with at least two layers (num_hidden_layers in config.json)")
    if getattr(shortened, "layer_types", None):
        shortened.layer_types = shortened.layer_types[:-1]
    shortened.num_hidden_layers -= 1
    return shortened
