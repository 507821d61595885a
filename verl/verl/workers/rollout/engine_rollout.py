"""From a batch of prompts to a batch of responses, by an `xbai` engine in this process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from verl import DataProto
from xbai.engine import Completion, SamplingParams, load_engine
from xbai.engine.files import read_config, resolve_dtype
from xbai.errors import UserError

SAMPLING_KEYS = ("n", "temperature", "top_p", "top_k", "do_sample")


class EngineRollout:
    """One engine for each data-parallel rank.

    Args:
        config: the `rollout` section: `name`, `prompt_length`, `response_length`, the sampling keys and the engine's.
        model: the `model` section: `path`, the folder to start from, and `trust_remote_code`.
        pad_token_id: fills prompts and responses up to their width.

    Attributes:
        engine: the engine.
        dtype: what it keeps its weights in.

    Raises:
        UserError: an unknown engine, or a key that it cannot honour.
    """

    def __init__(self, config: DictConfig, model: DictConfig, pad_token_id: int) -> None:
        if config.get("tensor_model_parallel_size", 1) != 1:
            raise UserError("rollout.tensor_model_parallel_size must be 1: every rank has an engine of its own")
        self._config = config
        self._pad_token_id = pad_token_id
        self._response_length: int = config.response_length
        trust_remote_code = model.get("trust_remote_code", False)
        self.dtype = resolve_dtype(config.dtype, read_config(model.path, trust_remote_code))
        self.engine = load_engine(
            config.name,
            model.path,
            dtype=config.dtype,
            max_model_len=config.get("max_model_len") or config.prompt_length + config.response_length,
            with_scores=False,
            trust_remote_code=trust_remote_code,
            **_engine_options(config),
        )

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take the policy's weights, by their Hugging Face names."""
        self.engine.update_weights(weights)

    def generate(self, prompts: DataProto) -> DataProto:
        """Sample `n` responses for each prompt.

        Args:
            prompts: `input_ids`, `attention_mask` [B, P], padded on the left; optionally an integer `seed` for each
                prompt in `non_tensor_batch`. `meta_info["validate"]` samples as `rollout.val_kwargs` say, and
                `n temperature top_p top_k do_sample` in `meta_info` override either.

        Returns:
            Rows of one prompt next to each other: `prompts` [B*n, P], `responses` [B*n, R] padded on the right,
            `input_ids attention_mask position_ids` [B*n, P+R], `response_mask` [B*n, R], and `rollout_log_probs`
            [B*n, R] in float32, 0 on padding.
        """
        ids, mask = prompts.batch["input_ids"], prompts.batch["attention_mask"]
        sampling = self._sampling(prompts.meta_info)
        seeds = prompts.non_tensor_batch.get("seed", [None] * len(prompts))
        completions = self.engine.generate(
            [row[kept].tolist() for row, kept in zip(ids, mask.bool())],
            [SamplingParams(**sampling, seed=None if seed is None else int(seed)) for seed in seeds],
        )
        return self._to_batch(ids, mask, [one for group in completions for one in group], sampling["n"])

    def _sampling(self, meta_info: Mapping[str, Any]) -> dict[str, Any]:
        source = self._config.val_kwargs if meta_info.get("validate") else self._config
        chosen = {key: source[key] for key in SAMPLING_KEYS if key in source}
        chosen |= {key: meta_info[key] for key in SAMPLING_KEYS if key in meta_info}
        if not chosen.pop("do_sample", True):
            chosen["temperature"] = 0.0
        fixed = {
            "max_tokens": self._response_length,
            "ignore_eos": self._config.get("ignore_eos", False),
            "log_probs": True,
        }
        return chosen | fixed

    def _to_batch(self, ids: Tensor, mask: Tensor, completions: Sequence[Completion], n: int) -> DataProto:
        lengths = torch.tensor([len(one.token_ids) for one in completions])
        response_mask = torch.arange(self._response_length) < lengths[:, None]
        responses = torch.full(response_mask.shape, self._pad_token_id)
        responses[response_mask] = torch.tensor([token for one in completions for token in one.token_ids])
        log_probs = torch.zeros(response_mask.shape)
        log_probs[response_mask] = torch.tensor([value for one in completions for value in one.log_probs])
        prompts = ids.repeat_interleave(n, dim=0)
        attention_mask = torch.cat([mask.repeat_interleave(n, dim=0), response_mask.to(mask.dtype)], dim=1)
        return DataProto.from_dict(
            {
                "prompts": prompts,
                "responses": responses,
                "input_ids": torch.cat([prompts, responses], dim=1),
                "attention_mask": attention_mask,
                "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
                "response_mask": response_mask,
                "rollout_log_probs": log_probs,
            }
        )


def _engine_options(config: DictConfig) -> dict[str, Any]:
    keys = ["max_num_seqs"]
    if config.name == "vllm":
        keys += ["max_num_batched_tokens", "enforce_eager"]
        if torch.cuda.is_available():
            keys.append("gpu_memory_utilization")
    return {key: config[key] for key in keys if config.get(key) is not None}
