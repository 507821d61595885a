"""From a batch of prompts to a batch of responses, by an `xbai` engine in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from verl import DataProto
from verl.trainer.config.schema import ModelConfig, RolloutConfig
from verl.workers.phase_metrics import GIB
from verl.workers.phase_profiler import PHASE_PROFILER
from xbai.engine import Completion, SamplingParams, load_engine
from xbai.engine.files import read_config, resolve_dtype
from xbai.engine.fused_scores import obstacle
from xbai.sprm import SPRMConfig, aggregate

Weights = Iterable[tuple[str, Tensor]]
SAMPLING_KEYS = ("n", "temperature", "top_p", "top_k", "do_sample")


class EngineRollout:
    """One engine for each rank, or one for each `tensor_model_parallel_size` consecutive ranks, which then make the
    same calls with the same prompts.

    On a GPU with `free_cache_engine` the engine sleeps but for generating; `sleep_level` 1 keeps its weights in CPU
    memory, 2 drops them.

    Args:
        config: the `rollout` section: `name`, `prompt_length`, `response_length`, the sampling keys and the engine's.
        model: the `model` section: `path`, the folder to start from, `trust_remote_code` and `head_dtype`.
        pad_token_id: fills prompts and responses up to their width.
        sprm_config: of the score head that is trained. Where the engine scores tokens in the forward pass that samples
            them, it takes this head with the policy's weights, and responses come with their scores.

    Attributes:
        engine: the engine.
        dtype: what it keeps its weights in.

    Raises:
        UserError: an unknown engine, or a key that it cannot honour.
    """

    def __init__(
        self, config: RolloutConfig, model: ModelConfig, pad_token_id: int, sprm_config: SPRMConfig | None = None
    ) -> None:
        self._config, self._pad_token_id = config, pad_token_id
        model_config, options = read_config(model.path, model.trust_remote_code), _engine_options(config)
        self.dtype = resolve_dtype(config.dtype, model_config)
        self._scores = sprm_config is not None and config.name == "vllm" and obstacle(model_config, options) is None
        if self._scores:
            options["sprm_config"] = sprm_config
        self.engine = load_engine(
            config.name,
            model.path,
            dtype=config.dtype,
            max_model_len=config.max_model_len or config.prompt_length + config.response_length,
            with_scores=False,
            head_dtype=model.head_dtype,
            trust_remote_code=model.trust_remote_code,
            **options,
        )
        self.engine.after_iteration = PHASE_PROFILER.tick
        # The engine begins with the folder's policy, but with a head without weights.
        self._is_current, self._is_asleep = not self._scores, False
        self.sleep()

    def mark_stale(self) -> None:
        """Have `wake_up` bring the new weights."""
        self._is_current = False

    def sleep(self) -> None:
        """Leave the GPU's memory to training, where `free_cache_engine` asks for it."""
        if self._config.free_cache_engine and torch.cuda.is_available():
            self.engine.sleep(self._config.sleep_level)
            self._is_asleep = True
            self._is_current = self._is_current and self._config.sleep_level == 1

    def wake_up(self, policy_weights: Callable[[], AbstractContextManager[Weights]]) -> dict[str, float]:
        """Make the engine ready to generate with the present policy.

        The KV cache comes last, so that it and a policy that is there for the sync never take memory together.

        Args:
            policy_weights: has the policy on the device inside and yields its weights, by their Hugging Face names;
                not called when the engine has them already.

        Returns:
            `perf/weight_sync_gib`, what was brought.

        Raises:
            UserError: with `check_weight_sync`, the first weight that did not arrive as it was sent.
        """
        metrics: dict[str, float] = {}
        if self._is_asleep:
            self.engine.wake_up(["weights"])
        if not self._is_current:
            with policy_weights() as weights:
                metrics["perf/weight_sync_gib"] = self._update_weights(weights) / GIB
        if self._is_asleep:
            self.engine.wake_up(["kv_cache"])
        self._is_current, self._is_asleep = True, False
        return metrics

    def _update_weights(self, weights: Weights) -> int:
        sent = 0

        def counted() -> Iterator[tuple[str, Tensor]]:
            nonlocal sent
            for name, tensor in weights:
                sent += tensor.nbytes
                yield name, tensor

        self.engine.update_weights(counted(), check=self._config.check_weight_sync)
        return sent

    def generate(self, prompts: DataProto) -> DataProto:
        """Sample `n` responses for each prompt.

        Args:
            prompts: `input_ids`, `attention_mask` [B, P], padded on the left; optionally an integer `seed` for each
                prompt in `non_tensor_batch`. `meta_info["validate"]` samples as `rollout.val_kwargs` say, and
                `n temperature top_p top_k do_sample` in `meta_info` override either.

        Returns:
            Rows of one prompt next to each other: `prompts` [B*n, P], `responses` [B*n, R] padded on the right,
            `input_ids attention_mask position_ids` [B*n, P+R], `response_mask` [B*n, R], and `rollout_log_probs`
            [B*n, R] in float32, 0 on padding; `rollout_scores` [B*n], the responses' scores where the engine has them.
            `meta_info["metrics"]` has `rollout/prefix_cache_hit_rate`, the share of prompt tokens that were not
            computed anew, of an engine that counts it.
        """
        ids, mask = prompts.batch["input_ids"], prompts.batch["attention_mask"]
        sampling = self._sampling(prompts.meta_info)
        seeds = prompts.non_tensor_batch.get("seed", [None] * len(prompts))
        counted, cached = self.engine.prompt_tokens, self.engine.cached_prompt_tokens
        completions = self.engine.generate(
            [row[kept].tolist() for row, kept in zip(ids, mask.bool(), strict=True)],
            [SamplingParams(**sampling, seed=None if seed is None else int(seed)) for seed in seeds],
            return_scores=self._scores,
        )
        responses = [one for group in completions for one in group]
        batch = self._to_batch(ids, mask, responses, sampling["n"])
        if self._scores:
            batch.batch["rollout_scores"] = torch.tensor([aggregate(_returned(one.step_scores)) for one in responses])
        batch.meta_info["metrics"] = {}
        if counted := self.engine.prompt_tokens - counted:
            hit_rate = (self.engine.cached_prompt_tokens - cached) / counted
            batch.meta_info["metrics"]["rollout/prefix_cache_hit_rate"] = hit_rate
        return batch

    def _sampling(self, meta_info: Mapping[str, Any]) -> dict[str, Any]:
        source = self._config.val_kwargs if meta_info.get("validate") else self._config
        chosen = {key: getattr(source, key) for key in SAMPLING_KEYS if hasattr(source, key)}
        chosen |= {key: meta_info[key] for key in SAMPLING_KEYS if key in meta_info}
        if not chosen.pop("do_sample", True):
            chosen["temperature"] = 0.0
        config = self._config
        return chosen | {"max_tokens": config.response_length, "ignore_eos": config.ignore_eos, "log_probs": True}

    def _to_batch(self, ids: Tensor, mask: Tensor, completions: Sequence[Completion], n: int) -> DataProto:
        lengths = torch.tensor([len(one.token_ids) for one in completions])
        response_mask = torch.arange(self._config.response_length) < lengths[:, None]
        responses = torch.full(response_mask.shape, self._pad_token_id)
        responses[response_mask] = torch.tensor([token for one in completions for token in one.token_ids])
        log_probs = torch.zeros(response_mask.shape)
        log_probs[response_mask] = torch.tensor([value for one in completions for value in _returned(one.log_probs)])
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


def _returned(values: list[float] | None) -> list[float]:
    if values is None:
        raise ValueError("the engine returned no log-probs or scores, and was asked for them")
    return values


def _engine_options(config: RolloutConfig) -> dict[str, Any]:
    keys = ["max_num_seqs"]
    if config.name == "vllm":
        keys += ["max_num_batched_tokens", "enforce_eager"]
        if torch.cuda.is_available():
            keys.append("gpu_memory_utilization")
    options = {key: value for key in keys if (value := getattr(config, key)) is not None}
    if (ranks := config.tensor_model_parallel_size) > 1:
        options["tensor_parallel_size"] = ranks
    return options
