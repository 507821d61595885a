"""From a batch of prompts to a batch of responses, by an `xbai` engine in this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl import DataProto
from verl.trainer.config.schema import ModelConfig, RolloutConfig
from verl.workers.phase_metrics import GIB
from verl.workers.phase_profiler import PHASE_PROFILER
from verl.workers.rollout.quota import Quota
from verl.workers.rollout.response_batch import response_batch
from xbai.engine import Completion, SamplingParams, load_engine
from xbai.engine.files import read_config, resolve_dtype
from xbai.engine.fused_scores import obstacle
from xbai.engine.sample import Sample
from xbai.sprm import SPRMConfig, StepRule, aggregate
from xbai.sprm.steps import ScoredPart, joined_scores

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
        self._config, self._pad_token_id, self._sprm_config = config, pad_token_id, sprm_config
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
        with self._counted_prompt_tokens() as metrics:
            completions = self.engine.generate(
                [row[kept].tolist() for row, kept in zip(ids, mask.bool(), strict=True)],
                [SamplingParams(**sampling, seed=None if seed is None else int(seed)) for seed in seeds],
                return_scores=self._scores,
            )
        responses = [one for group in completions for one in group]
        token_ids, log_probs = [one.token_ids for one in responses], [_returned(one.log_probs) for one in responses]
        length = self._config.response_length
        batch = response_batch(ids, mask, token_ids, log_probs, length, self._pad_token_id)
        if self._scores:
            batch.batch["rollout_scores"] = torch.tensor([aggregate(_returned(one.step_scores)) for one in responses])
        batch.meta_info["metrics"] = metrics
        return batch

    def proceed(self, unfinished: DataProto, wanted: int) -> DataProto:
        """Go on with responses until all engines together have finished `wanted` groups of them, or have all ended.

        Args:
            unfinished: a row for each response: its `uid`, which is that of its group, all of whose unfinished
                responses are here; arrays `prompt_ids` and `token_ids`, what it has until now, and `step_scores` of
                that; the `seed` of what follows.

        Returns:
            For the same rows what was added, arrays `token_ids` in int32 and `log_probs` in float32, and whether each
            `has_ended`; where the engine has them, `step_scores` in float32 of the response from its beginning. Of a
            step that ends with the first added token there is none. `meta_info["metrics"]` as of `generate`.
        """
        rows, sampling = unfinished.non_tensor_batch, self._sampling({}) | {"n": 1}
        samples: list[Sample] = []
        for prompt_ids, token_ids, seed in zip(rows["prompt_ids"], rows["token_ids"], rows["seed"], strict=True):
            left = self._config.response_length - len(token_ids)
            params = SamplingParams(**sampling | {"max_tokens": left, "seed": seed})
            samples += self.engine.samples([*prompt_ids.tolist(), *token_ids.tolist()], params, self._scores)
        with self._counted_prompt_tokens() as metrics:
            ended = self._run(dict(zip(samples, rows["uid"], strict=True)), wanted)
            left_over = [sample for sample in samples if sample not in ended]
            completions = ended | dict(zip(left_over, self.engine.so_far(left_over), strict=True))
            self.engine.abort(left_over)
        added = [completions[sample] for sample in samples]
        columns: dict[str, list[Any]] = {
            "token_ids": [np.array(one.token_ids, np.int32) for one in added],
            "log_probs": [np.array(_returned(one.log_probs), np.float32) for one in added],
            "has_ended": [sample in ended for sample in samples],
        }
        if self._sprm_config is not None and self._scores:
            rule, before = self._sprm_config.step_rule, (rows["prompt_ids"], rows["token_ids"], rows["step_scores"])
            columns["step_scores"] = [
                np.array(_scores_with(rule, prompt_ids, token_ids, step_scores, one), np.float32)
                for prompt_ids, token_ids, step_scores, one in zip(*before, added, strict=True)
            ]
        return DataProto.from_dict(columns, meta_info={"metrics": metrics})

    def _run(self, groups: Mapping[Sample, str], wanted: int) -> dict[Sample, Completion]:
        """Sample until the quota is met; those that have ended, with their completions."""
        self._quota.start(wanted)
        for sample in groups:
            self.engine.add(sample)
        ended: dict[Sample, Completion] = {}
        missing, is_met = Counter(groups.values()), False
        while self.engine.has_unfinished() and not is_met:
            completions = dict(self.engine.step())
            ended |= completions
            missing.subtract(groups[sample] for sample in completions)
            whole = {group for group in map(groups.__getitem__, completions) if not missing[group]}
            is_met = self._quota.is_met(len(whole))
        return ended

    @cached_property
    def _quota(self) -> Quota:
        return Quota(self._config.tensor_model_parallel_size)

    @contextmanager
    def _counted_prompt_tokens(self) -> Iterator[dict[str, float]]:
        """Yield the metrics, which are there at the end."""
        metrics: dict[str, float] = {}
        counted, cached = self.engine.prompt_tokens, self.engine.cached_prompt_tokens
        yield metrics
        if counted := self.engine.prompt_tokens - counted:
            metrics["rollout/prefix_cache_hit_rate"] = (self.engine.cached_prompt_tokens - cached) / counted

    def _sampling(self, meta_info: Mapping[str, Any]) -> dict[str, Any]:
        source = self._config.val_kwargs if meta_info.get("validate") else self._config
        chosen = {key: getattr(source, key) for key in SAMPLING_KEYS if hasattr(source, key)}
        chosen |= {key: meta_info[key] for key in SAMPLING_KEYS if key in meta_info}
        if not chosen.pop("do_sample", True):
            chosen["temperature"] = 0.0
        config = self._config
        return chosen | {"max_tokens": config.response_length, "ignore_eos": config.ignore_eos, "log_probs": True}


def _returned(values: list[float] | None) -> list[float]:
    if values is None:
        raise ValueError("the engine returned no log-probs or scores, and was asked for them")
    return values


def _scores_with(
    rule: StepRule, prompt_ids: np.ndarray, token_ids: np.ndarray, step_scores: np.ndarray, added: Completion
) -> list[float]:
    before = ScoredPart(token_ids.tolist(), step_scores.tolist())
    return joined_scores(prompt_ids.tolist(), before, ScoredPart(added.token_ids, _returned(added.step_scores)), rule)


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
