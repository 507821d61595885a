"""Starting vLLM in this process: its environment, its arguments, its engine."""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from xbai.engine.fused_scores import register_models
from xbai.engine.vllm.toolchain import Toolchain, search_path
from xbai.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# vLLM reads these when it is first imported. A value set by the user stays, save for the first two: the engine core
# must run in this process, and with the model runner whose sampler sampler.py extends.
_REQUIRED_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
_DEFAULT_ENVIRONMENT = {
    # On CPU every warning is about a setting made here on purpose.
    "VLLM_LOGGING_LEVEL": "WARNING" if torch.cuda.is_available() else "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    # Automatic binding would pin the engines of all processes of a machine to the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # A float32 model's attention on a GPU is a Triton kernel, which would round its operands to TF32: step scores would
    # differ from the scorer's by more than 1e-4. What PyTorch multiplies, vLLM leaves in full precision by default.
    "TRITON_F32_DEFAULT": "ieee",
    # It is compiled at start-up, by nvcc, and left aside for every batch of which a request has a seed.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
_CPU_MAX_NUM_SEQS = 128
_CPU_BLOCK_TOKENS = 128
_MAX_CPU_CACHE_BYTES = 4 * 2**30


def check_devices(options: Mapping[str, Any]) -> None:
    """Raise a `UserError` for options that the GPUs, or the ranks of the process group, cannot honour."""
    devices, tensor_parallel_size = torch.cuda.device_count(), options.get("tensor_parallel_size", 1)
    if "gpu_memory_utilization" in options and devices == 0:
        raise UserError("gpu_memory_utilization: there is no GPU here; remove it")
    if torch.distributed.is_initialized():
        # Each rank has a GPU and may see no other one.
        if (ranks := torch.distributed.get_world_size()) % tensor_parallel_size:
            raise UserError(f"tensor_parallel_size={tensor_parallel_size} must divide the {ranks} ranks")
    elif tensor_parallel_size > devices > 0:
        raise UserError(f"tensor_parallel_size={tensor_parallel_size}: only {devices} GPUs here")


def dtype_name(dtype: torch.dtype) -> str:
    """As vLLM calls it."""
    return str(dtype).removeprefix("torch.")


def engine_arguments(config: PretrainedConfig, dtype: torch.dtype, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of vLLM's `EngineArgs`: what was chosen (None: nothing), and else what suits process and device."""
    given = {name: value for name, value in chosen.items() if value is not None}
    among_ranks = torch.distributed.is_initialized()
    arguments = {
        "dtype": dtype_name(dtype),
        # Of requests without a seed: fresh in every process, but one stream over the ranks of a trainer.
        "seed": 0 if among_ranks else secrets.randbits(31),
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "logprobs_mode": "raw_logprobs",
        # The samples of a prompt share its KV cache.
        "enable_prefix_caching": True,
    }
    if not among_ranks and given.get("tensor_parallel_size", 1) == 1:
        arguments["distributed_executor_backend"] = "uni"
    if not torch.cuda.is_available():
        return arguments | _cpu_arguments(config, dtype, given)
    # Of the memory that is free now, which a score head's backbone or a trainer shares.
    free, total = torch.cuda.mem_get_info()
    arguments |= {"enable_sleep_mode": among_ranks, "gpu_memory_utilization": 0.9 * free / total}
    return arguments | Toolchain.of(os.environ).attention(torch.cuda.get_device_capability(), dtype, given) | given


def _cpu_arguments(config: PretrainedConfig, dtype: torch.dtype, given: dict[str, Any]) -> dict[str, Any]:
    length, max_num_seqs = given["max_model_len"], given.get("max_num_seqs", _CPU_MAX_NUM_SEQS)
    usual = {"enforce_eager": True, "enable_chunked_prefill": False, "max_num_seqs": max_num_seqs}
    if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        sequence = -(-length // _CPU_BLOCK_TOKENS) * _CPU_BLOCK_TOKENS * _cache_bytes_per_token(config, dtype)
        usual["kv_cache_memory_bytes"] = max(2, min(max_num_seqs, _MAX_CPU_CACHE_BYTES // sequence)) * sequence
    # A seeded request that is prefilled in chunks crashes vLLM 0.32 on CPU, so a prompt must fit one iteration.
    tokens = max(given.get("max_num_batched_tokens", 8192), length)
    return usual | given | {"max_num_batched_tokens": tokens}


def _cache_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * dtype.itemsize


def start(arguments: dict[str, Any]) -> Any:
    """vLLM's `LLMEngine` of these `EngineArgs`; among ranks of a process group one that shares it.

    Raises:
        UserError: an option that vLLM does not have, or too little memory.
    """
    # Said while vLLM is imported, before it has read its logging level.
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
    os.environ["PATH"] = search_path(os.environ.get("PATH", ""))
    os.environ.update(_REQUIRED_ENVIRONMENT)
    for name, value in _DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return _construct(arguments)


def _construct(arguments: dict[str, Any]) -> Any:
    import vllm
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    register_models()
    unknown = sorted(arguments.keys() - {field.name for field in dataclasses.fields(EngineArgs)})
    if unknown:
        raise UserError(f"engine option {unknown[0]}: vLLM {vllm.__version__} has no such option; remove it")
    among_ranks = torch.distributed.is_initialized()
    if among_ranks:
        from xbai.engine.vllm.executor import RankExecutor

        # Ranks that see only their own GPU cannot open each other's memory, as all ways of reducing but NCCL's do.
        os.environ.setdefault("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
        os.environ.setdefault("VLLM_ALLREDUCE_USE_FLASHINFER", "0")
        arguments |= {"distributed_executor_backend": RankExecutor, "disable_custom_all_reduce": True}
    try:
        engine_args = EngineArgs(**arguments)
        if among_ranks:
            # What the compiler would put in place of an all-reduce and the norm after it opens such memory as well.
            engine_args.compilation_config.pass_config.fuse_allreduce_rms = False
        # As vLLM's offline class: the default context's batches are those of the smallest devices.
        return LLMEngine.from_engine_args(engine_args, UsageContext.LLM_CLASS)
    except Exception as error:
        if not among_ranks:
            # Else the next engine of this process would take vLLM's process group for a trainer's.
            cleanup_dist_env_and_memory()
        if isinstance(error, (ValueError, torch.OutOfMemoryError)) and "memory" in str(error):
            # vLLM names the options to change: max_model_len, gpu_memory_utilization.
            raise UserError(f"vLLM: {one_line(error)}") from error
        raise
