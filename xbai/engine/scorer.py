"""Step scores of whole sequences: the backbone without its last layer and LM head, and the score head on top."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from xbai.engine.files import read_config, resolve_dtype
from xbai.engine.linear import use_onednn
from xbai.engine.packed_batch import PackedBatch
from xbai.engine.weight_files import BACKBONE_PREFIX, load_pretrained
from xbai.errors import UserError
from xbai.model_folder import load_tokenizer
from xbai.sprm import ScoreHead, StepRule, load_score_head, load_sprm_config, trajectory_scores
from xbai.sprm.steps import step_positions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

HEAD_PREFIX = "score_head."
DEFAULT_MAX_BATCH_TOKENS = {"cuda": 16384, "cpu": 2048}
"""By device: enough to keep it busy. What comes while a batch is computed waits for it, so no more than that."""
CHUNK_TOKENS = 2048
"""So many tokens at a time go through an MLP, whose inner states are several times as wide as all others."""


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


class ScoreBatch:
    """Sequences to score in one forward pass, of `max_tokens` as `PackedBatch` counts them, each up to its last step:
    what follows that decides nothing.
    """

    def __init__(self, step_rule: StepRule, max_tokens: int) -> None:
        self.packed = PackedBatch(max_tokens)
        self.sequences: list[list[int]] = []
        self.positions: list[list[int]] = []
        self._step_rule = step_rule

    def add(self, ids: list[int], response_start: int) -> bool:
        """Take a sequence; False where the batch is too full for it."""
        positions = step_positions(ids, response_start, self._step_rule)
        if not self.packed.add(ids[: positions[-1] + 1] if positions else ()):
            return False
        self.sequences.append(list(ids))
        self.positions.append(positions)
        return True


class Scorer:
    """Scores batches of sequences with one forward pass of L-1 decoder layers, without padding.

    Args:
        backbone: a decoder whose output is the residual stream after layer L-2 (see `truncate_backbone`); from now on
            the scorer's own.
        head, step_rule: what gives a score, and where.
        max_batch_tokens: most tokens of one forward pass, a longer sequence runs alone; None for what suits the device.
    """

    def __init__(
        self, backbone: PreTrainedModel, head: ScoreHead, step_rule: StepRule, max_batch_tokens: int | None = None
    ) -> None:
        self.backbone = backbone.eval()
        self.device = backbone.device
        self.head = head.to(self.device).eval()
        self.step_rule = step_rule
        self.max_model_len: int = backbone.config.max_position_embeddings
        self._parameters = dict(backbone.named_parameters())
        self._max_batch_tokens = prepare_for_packing(backbone, max_batch_tokens)

    @classmethod
    def from_folder(
        cls,
        model_path: str | Path,
        *,
        dtype: str = "auto",
        lang: str | None = None,
        device: str | torch.device | None = None,
        max_batch_tokens: int | None = None,
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
        torch_dtype = resolve_dtype(dtype, config)
        _drop_last_layer(config)
        backbone = load_pretrained(
            AutoModel,
            model_path,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            config=config,
            dtype=torch_dtype,
            trust_remote_code=trust_remote_code,
        )
        backbone.norm = nn.Identity()
        return cls(backbone, head, sprm_config.step_rule, max_batch_tokens)

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
        results: list[Scored] = []
        batch = self.new_batch()
        for ids, start in zip(sequences, response_starts, strict=True):
            if not batch.add(ids, start):
                results += self.run(batch)
                batch = self.new_batch()
                batch.add(ids, start)
        return results + self.run(batch)

    def new_batch(self) -> ScoreBatch:
        """An empty batch, to be filled for `run`."""
        return ScoreBatch(self.step_rule, self._max_batch_tokens)

    @torch.inference_mode()
    def run(self, batch: ScoreBatch) -> list[Scored]:
        """Score a batch; results in the order in which its sequences were added."""
        counts = [len(positions) for positions in batch.positions]
        if not any(counts):
            return [Scored(0.0, [], ids, []) for ids in batch.sequences]
        hidden = self.backbone(**batch.packed.inputs(self.device), use_cache=False).last_hidden_state[0]
        step_logits = self.head(hidden[batch.packed.places(batch.positions).to(self.device)]).float().cpu()
        rows = pad_sequence(step_logits.split(counts), batch_first=True)
        is_step = torch.arange(rows.shape[1]) < torch.tensor(counts)[:, None]
        values, scores = trajectory_scores(rows, is_step).tolist(), rows.sigmoid()
        found = [row[:count].tolist() for row, count in zip(scores, counts, strict=True)]
        return list(map(Scored, values, found, batch.sequences, batch.positions))

    @torch.no_grad()
    def load_weight(self, name: str, tensor: Tensor) -> None:
        """Copy one weight in under its Hugging Face name, the head's under `score_head.*`; others are not needed."""
        if name.startswith(HEAD_PREFIX):
            target: nn.Parameter | None = self.head.get_parameter(name.removeprefix(HEAD_PREFIX))
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


def prepare_for_packing(model: PreTrainedModel, max_batch_tokens: int | None) -> int:
    """Make a model, or its backbone, compute packed sequences, and fast.

    Returns:
        The most tokens of a `PackedBatch`: those asked for, or what suits the device; 0 where none can be packed.
    """
    from xbai.engine.packed_attention import PACKED_ATTENTION, why_not_packed

    reason = why_not_packed(model)
    if reason is None:
        model.set_attn_implementation(PACKED_ATTENTION)
    else:
        logger.warning("%s computes one text at a time: no packed sequences, %s", type(model).__name__, reason)
    use_onednn(model)
    backbone: Any = model.base_model
    for layer in backbone.layers:
        layer.mlp.forward = partial(_by_chunks, layer.mlp.forward)
    return 0 if reason else max_batch_tokens or DEFAULT_MAX_BATCH_TOKENS[model.device.type]


def head_shapes(head: ScoreHead) -> dict[str, torch.Size]:
    """The shape of each of a head's weights, by the name under which engines are sent them."""
    return {f"{HEAD_PREFIX}{name}": weight.shape for name, weight in head.named_parameters()}


def truncate_backbone(backbone: PreTrainedModel) -> PreTrainedModel:
    """A decoder without last layer and final norm; its parameters stay shared with `backbone`."""
    shared = {id(tensor): tensor for tensor in chain(backbone.parameters(), backbone.buffers())}
    view: Any = copy.deepcopy(backbone, shared)
    _drop_last_layer(view.config)
    view.layers = view.layers[:-1]
    view.norm = nn.Identity()
    return view


def _by_chunks(forward: Callable[[Tensor], Tensor | tuple[Tensor, ...]], hidden: Tensor) -> Tensor | tuple[Tensor, ...]:
    """An MLP's `forward` on a few tokens of [1, N, c] at a time; a router's scores [N, experts] may come beside."""
    if hidden.shape[1] <= CHUNK_TOKENS:
        return forward(hidden)
    chunks: list[Any] = [forward(chunk) for chunk in hidden.split(CHUNK_TOKENS, dim=1)]
    if isinstance(chunks[0], Tensor):
        return torch.cat(chunks, dim=-2)
    return tuple(torch.cat(parts, dim=-2) for parts in zip(*chunks, strict=True))


def _drop_last_layer(config: PretrainedConfig) -> None:
    if config.num_hidden_layers < 2:
        raise UserError("the score head needs a decoder with at least two layers (num_hidden_layers in config.json)")
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:-1]
    config.num_hidden_layers -= 1
