"""The reference engine: a batched KV-cache sampler on transformers, with no dependency on vLLM."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from xbai.engine.base import Completion, Engine, Sample
from xbai.engine.files import (
    eos_token_ids,
    load_tokenizer,
    quiet_transformers,
    read_config,
    resolve_dtype,
    resolve_max_model_len,
)
from xbai.engine.sampling import BatchSampler
from xbai.engine.scorer import Scorer, truncate_backbone
from xbai.engine.weight_check import HeldWeight
from xbai.sprm import load_score_head, load_sprm_config


class HFEngine(Engine):
    """Generates batch by batch: a step runs as many queued samples as the budgets allow, to completion.

    Args:
        model_path: a Hugging Face model folder.
        dtype: `auto` (the checkpoint's), `float32`, `bfloat16` or `float16`.
        max_model_len: most tokens of prompt plus response; the model's context by default.
        lang: step rule of a head without `sprm_config.json`.
        with_scores: load the score head.
        trust_remote_code: run the Python code that comes with the folder.
        max_num_seqs: most samples of one batch.
        max_cache_slots: most KV-cache slots (rows x padded length) of one batch; a larger sample runs alone.
        seed: of the random streams of requests without a seed.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        lang: str | None = None,
        with_scores: bool = False,
        trust_remote_code: bool = False,
        max_num_seqs: int = 64,
        max_cache_slots: int = 131072,
        seed: int | None = None,
    ) -> None:
        config = read_config(model_path, trust_remote_code)
        tokenizer = load_tokenizer(model_path, trust_remote_code)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                str(model_path),
                dtype=resolve_dtype(dtype, config),
                local_files_only=True,
                trust_remote_code=trust_remote_code,
            )
        self._model = model.to(self.device).eval()
        scorer = None
        if with_scores:
            sprm_config = load_sprm_config(model_path, tokenizer, lang)
            head = load_score_head(model_path, config.hidden_size, sprm_config)
            scorer = Scorer(truncate_backbone(model.model), head, sprm_config.step_rule)
        length = resolve_max_model_len(max_model_len, config)
        super().__init__(config, tokenizer, length, scorer, seed, trust_remote_code)
        self._eos_ids = frozenset(eos_token_ids(model_path, config, tokenizer))
        self._max_num_seqs = max_num_seqs
        self._max_cache_slots = max_cache_slots
        self._queue: deque[Sample] = deque()

    def close(self) -> None:
        """Free the model."""
        self._queue.clear()
        self._model = self.scorer = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _enqueue(self, samples: list[Sample]) -> None:
        self._queue.extend(samples)

    def _drop(self, samples: list[Sample]) -> None:
        keys = {sample.key for sample in samples}
        self._queue = deque(sample for sample in self._queue if sample.key not in keys)

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
        while self._queue and len(batch) < self._max_num_seqs:
            sample = self._queue[0]
            longest_prompt = max(longest_prompt, len(sample.prompt_ids))
            longest_response = max(longest_response, sample.params.max_tokens)
            if batch and (len(batch) + 1) * (longest_prompt + longest_response) > self._max_cache_slots:
                break
            batch.append(self._queue.popleft())
        return batch

    @torch.inference_mode()
    def _advance(self) -> list[tuple[Sample, Completion]]:
        samples = self._next_batch()
        if not samples:
            return []
        rows = [_Row(sample, self.tokenizer, self._eos_ids) for sample in samples]
        sampler = BatchSampler(samples, self.vocab_size, self.device)
        input_ids, attention_mask = self._left_padded(samples)
        cache = DynamicCache(config=self._model.config)
        active = rows
        while True:
            tokens, log_probs = sampler(self._forward(input_ids, attention_mask, cache))
            for row, token, log_prob in zip(active, tokens.tolist(), log_probs.tolist(), strict=True):
                row.append(token, log_prob)
            unfinished = [index for index, row in enumerate(active) if row.finish_reason is None]
            if not unfinished:
                return [(row.sample, row.completion()) for row in rows]
            if 2 * len(unfinished) <= len(active):
                keep = torch.tensor(unfinished, device=self.device)
                cache.batch_select_indices(keep)
                sampler.keep(keep)
                tokens, attention_mask = tokens[keep], attention_mask[keep]
                active = [active[index] for index in unfinished]
            input_ids = tokens[:, None]
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(active), 1)], dim=1)

    def _left_padded(self, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        width = max(len(sample.prompt_ids) for sample in samples)
        input_ids = torch.zeros(len(samples), width, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, sample in enumerate(samples):
            input_ids[row, width - len(sample.prompt_ids) :] = torch.tensor(sample.prompt_ids)
            attention_mask[row, width - len(sample.prompt_ids) :] = 1
        return input_ids.to(self.device), attention_mask.to(self.device)

    def _forward(self, input_ids: Tensor, attention_mask: Tensor, cache: DynamicCache) -> Tensor:
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        output = self._model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


@dataclass
class _Row:
    """One sample on its way: its tokens so far, and why it ended."""

    sample: Sample
    tokenizer: object
    eos_ids: frozenset[int]
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    def append(self, token: int, log_prob: float) -> None:
        """Take the next token, unless the row has ended."""
        if self.finish_reason is not None:
            return
        self.token_ids.append(token)
        self.log_probs.append(log_prob)
        params = self.sample.params
        if (token in self.eos_ids and not params.ignore_eos) or self._stops():
            self.finish_reason = "stop"
        elif len(self.token_ids) >= params.max_tokens:
            self.finish_reason = "length"

    def completion(self) -> Completion:
        """The finished completion, its text cut before the first stop string."""
        text = self._decode(self.token_ids)
        cuts = [text.index(stop) for stop in self.sample.params.stop if stop in text]
        return Completion(
            token_ids=self.token_ids,
            text=text[: min(cuts, default=len(text))],
            finish_reason=self.finish_reason,
            log_probs=self.log_probs if self.sample.params.log_probs else None,
        )

    def _stops(self) -> bool:
        stop = self.sample.params.stop
        if not stop:
            return False
        # A stop string of k bytes ends within the last k tokens and a few that share its last character.
        tail = self._decode(self.token_ids[-(max(len(s.encode()) for s in stop) + 4) :])
        return any(s in tail for s in stop)

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)
