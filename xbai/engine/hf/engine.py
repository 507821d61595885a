"""The reference engine: a batched KV-cache sampler on transformers, with no dependency on vLLM."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, DynamicCache

from xbai.engine.base import Engine
from xbai.engine.detokenizer import Detokenizer
from xbai.engine.files import ModelOptions
from xbai.engine.hf.sampling import BatchSampler
from xbai.engine.linear import use_float32_output
from xbai.engine.sample import Completion, FinishReason, Sample
from xbai.engine.scorer import Scorer, truncate_backbone
from xbai.engine.weight_check import HeldWeight
from xbai.engine.weight_files import load_pretrained
from xbai.sprm import load_score_head, load_sprm_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HFEngine(Engine):
    """Generates batch by batch: as many queued samples as the budgets allow, each step adding a token to all of them.

    Args:
        options: what to load.
        max_num_seqs: most samples of one batch.
        max_cache_slots: most KV-cache slots (rows x padded length) of one batch; a larger sample runs alone.
    """

    def __init__(self, options: ModelOptions, *, max_num_seqs: int = 64, max_cache_slots: int = 131072) -> None:
        super().__init__(options)
        path = options.model_path
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        head = None
        if options.with_scores:
            sprm_config = load_sprm_config(path, self.tokenizer, options.lang)
            head = load_score_head(path, self._config.hidden_size, sprm_config)
        self._model = load_pretrained(
            AutoModelForCausalLM,
            path,
            device=self.device,
            dtype=self._dtype,
            trust_remote_code=options.trust_remote_code,
        ).eval()
        if self._logits_dtype != self._dtype:
            use_float32_output(self._model.get_output_embeddings())
        if head is not None:
            self.scorer = Scorer(truncate_backbone(self._model.model), head, sprm_config.step_rule)
        self.max_num_seqs = max_num_seqs
        self._max_cache_slots = max_cache_slots
        self._queue: deque[Sample] = deque()
        self._batch: _Batch | None = None

    def close(self) -> None:
        """Free the model."""
        self._queue.clear()
        self._batch = None
        self._model = self.scorer = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def token_ids(self, sample: Sample) -> Sequence[int]:
        """See `Engine`."""
        return self._row_of(sample).token_ids

    def _so_far(self, sample: Sample) -> Completion:
        row = self._row_of(sample)
        log_probs = list(row.log_probs) if sample.params.log_probs else None
        return Completion(list(row.token_ids), "", "pruned", log_probs)

    def _row_of(self, sample: Sample) -> _Row:
        row = self._batch.row_of.get(sample) if self._batch is not None else None
        return row or _Row(sample, self.detokenize)

    def _enqueue(self, sample: Sample) -> None:
        self._queue.append(sample)

    def _drop(self, samples: list[Sample]) -> None:
        dropped = set(samples)
        self._queue = deque(sample for sample in self._queue if sample not in dropped)
        if self._batch is not None:
            self._batch.drop(dropped)

    def _load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, tensor in weights:
                parameters[name].copy_(tensor)

    def _held_weights(self) -> Mapping[str, HeldWeight]:
        return {
            name: HeldWeight((), parameter.dtype, partial(iter, (parameter,)))
            for name, parameter in self._model.named_parameters(remove_duplicate=False)
        }

    def _next_batch(self) -> list[Sample]:
        batch: list[Sample] = []
        longest_prompt = longest_response = 0
        while self._queue and len(batch) < self.max_num_seqs:
            sample = self._queue[0]
            longest_prompt = max(longest_prompt, len(sample.prompt_ids))
            longest_response = max(longest_response, sample.params.max_tokens)
            if batch and (len(batch) + 1) * (longest_prompt + longest_response) > self._max_cache_slots:
                break
            batch.append(self._queue.popleft())
        return batch

    @torch.inference_mode()
    def _advance(self) -> list[tuple[Sample, Completion]]:
        if self._batch is None or not self._batch.unfinished:
            self._batch = None
            if not (samples := self._next_batch()):
                return []
            rows = [_Row(sample, self.detokenize) for sample in samples]
            self._batch = _Batch(self._model, rows, BatchSampler(samples, self.vocab_size, self.device), self.device)
        return [(row.sample, self._completion(row, reason)) for row, reason in self._batch.advance()]

    def _completion(self, row: _Row, finish_reason: FinishReason) -> Completion:
        log_probs = row.log_probs if row.sample.params.log_probs else None
        return Completion(row.token_ids, self._response_text(row.sample, row.token_ids), finish_reason, log_probs)


class _Batch:
    """Samples that began together, over one KV cache; the rows of ended ones go once they are half of it."""

    def __init__(self, model: PreTrainedModel, rows: list[_Row], sampler: BatchSampler, device: torch.device) -> None:
        self._model = model
        self._rows = rows
        self.row_of = {row.sample: row for row in rows}
        self._sampler = sampler
        self._cache = DynamicCache(config=model.config)
        align = partial(pad_sequence, batch_first=True, padding_side="left")
        prompts = [torch.tensor(row.sample.prompt_ids) for row in rows]
        self._input_ids = align(prompts).to(device)
        self._attention_mask = align([torch.ones_like(prompt) for prompt in prompts]).to(device)

    @property
    def unfinished(self) -> list[int]:
        """The rows still being written."""
        return [index for index, row in enumerate(self._rows) if not row.has_ended]

    def advance(self) -> list[tuple[_Row, FinishReason]]:
        """Add a token to every unfinished row; the rows which that finished, and why."""
        before = [row for row in self._rows if not row.has_ended]
        tokens, log_probs = self._sampler(self._forward())
        for row, token, log_prob in zip(self._rows, tokens.tolist(), log_probs.tolist(), strict=True):
            row.append(token, log_prob)
        finished = [(row, row.finish_reason) for row in before if row.finish_reason is not None]
        self._shrink_to(self.unfinished, tokens)
        return finished

    def drop(self, samples: set[Sample]) -> None:
        """End the rows of these samples, which nobody waits for."""
        for row in self._rows:
            row.is_dropped |= row.sample in samples

    def _shrink_to(self, unfinished: list[int], tokens: Tensor) -> None:
        if not unfinished:
            return
        if 2 * len(unfinished) <= len(self._rows):
            keep = torch.tensor(unfinished, device=tokens.device)
            self._cache.batch_select_indices(keep)
            self._sampler.keep(keep)
            tokens, self._attention_mask = tokens[keep], self._attention_mask[keep]
            self._rows = [self._rows[index] for index in unfinished]
        self._input_ids = tokens[:, None]
        self._attention_mask = pad(self._attention_mask, (0, 1), value=1)

    def _forward(self) -> Tensor:
        position_ids = (self._attention_mask.cumsum(1) - 1).clamp(min=0)[:, -self._input_ids.shape[1] :]
        output = self._model(
            input_ids=self._input_ids,
            attention_mask=self._attention_mask,
            position_ids=position_ids,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


@dataclass
class _Row:
    """One sample on its way: its tokens so far, and why it ended."""

    sample: Sample
    detokenize: Detokenizer
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    is_dropped: bool = False

    @property
    def has_ended(self) -> bool:
        """No token is to come."""
        return self.is_dropped or self.finish_reason is not None

    def append(self, token: int, log_prob: float) -> None:
        """Take the next token, unless the row has ended."""
        if self.has_ended:
            return
        self.token_ids.append(token)
        self.log_probs.append(log_prob)
        params = self.sample.params
        if token in self.sample.end_ids or self._stops():
            self.finish_reason = "stop"
        elif token in params.stop_token_ids:
            self.finish_reason = "stop_token"
        elif len(self.token_ids) >= params.max_tokens:
            self.finish_reason = "length"

    def _stops(self) -> bool:
        stop = self.sample.params.stop
        if not stop:
            return False
        # A stop string of k bytes ends within the last k tokens and a few that share its last character.
        tail = self.detokenize(self.token_ids[-(max(len(s.encode()) for s in stop) + 4) :])
        return any(s in tail for s in stop)
