"""The `rollout` section: how to sample, and what vLLM divides among ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from verl.trainer.config.fields import (
    ON_GPU,
    WITH_VLLM,
    Field,
    Flag,
    Number,
    Positive,
    PositiveNumber,
    Section,
    ServedDtype,
    Whole,
    told,
)
from xbai.engine import SamplingParams
from xbai.engine.tensor_parallel import check_tensor_parallel_size
from xbai.errors import UserError

SECTION = "actor_rollout_ref.rollout"


@dataclass(frozen=True, kw_only=True)
class Sampling(Section):
    """How responses are drawn."""

    n: Positive
    temperature: Number
    top_k: Whole
    top_p: Number

    def sampling_mistakes(self, name: str) -> Iterator[str]:
        """A line, if the section `name` samples as no engine could."""
        # As they were written: 1, not 1.0.
        temperature, top_p = (int(x) if x.is_integer() else x for x in (self.temperature, self.top_p))
        try:
            SamplingParams(temperature=temperature, top_p=top_p, top_k=self.top_k)
        except UserError as error:
            yield f"{name}.{str(error).removeprefix('sampling: ')}"


@dataclass(frozen=True, kw_only=True)
class ValidationSampling(Sampling):
    """`val_kwargs`."""

    do_sample: Flag


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Sampling):
    """The engine, its memory, and the batches of the log-probs that the policy computes of its responses."""

    name: Literal["vllm", "hf"]
    mode: Literal["sync", "async"]
    prompt_length: Positive
    response_length: Positive
    temperature: PositiveNumber
    tensor_model_parallel_size: Annotated[Positive, WITH_VLLM]
    gpu_memory_utilization: Annotated[Number, Field(gt=0, le=1), ON_GPU, WITH_VLLM]
    max_num_batched_tokens: Annotated[Positive, WITH_VLLM]
    max_num_seqs: Positive
    max_model_len: Positive | None
    dtype: ServedDtype
    enforce_eager: Annotated[Flag | None, WITH_VLLM]
    free_cache_engine: Annotated[Flag, ON_GPU, WITH_VLLM]
    sleep_level: Annotated[Literal[1, 2], ON_GPU, WITH_VLLM]
    check_weight_sync: Flag
    ignore_eos: Flag
    log_prob_micro_batch_size_per_gpu: Positive
    log_prob_use_dynamic_bsz: Flag
    log_prob_max_token_len_per_gpu: Whole
    val_kwargs: ValidationSampling

    def mistakes(self, ranks_of_node: int, shape: Mapping[str, Any]) -> Iterator[str]:
        """A line for each; `shape` is the model's config.json, as far as it is known."""
        if self.mode == "async":
            yield (f"{SECTION}.mode=async is for verl's agent loops, which this trainer does not have; use mode=sync")
        if self.sleep_level != 2 and not self.free_cache_engine:
            yield (
                f"{SECTION}.sleep_level={self.sleep_level} cannot act with free_cache_engine=false, with which the "
                "engine never sleeps"
            )
        yield from self.sampling_mistakes(SECTION)
        yield from self.val_kwargs.sampling_mistakes(f"{SECTION}.val_kwargs")
        if (size := self.tensor_model_parallel_size) > 1 and self.name == "vllm":
            key = f"{SECTION}.tensor_model_parallel_size={size}"
            if ranks_of_node % size:
                yield (
                    f"{key} must divide trainer.n_gpus_per_node={ranks_of_node}: ranks that share an engine are on one "
                    "machine"
                )
            else:
                yield from told(check_tensor_parallel_size, size, shape, key)
