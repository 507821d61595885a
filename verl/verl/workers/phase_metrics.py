"""What a phase of training cost on this rank."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from verl import DataProto
from verl.models.identical_rows import DistinctRows
from verl.workers.phase_profiler import PHASE_PROFILER

GIB = 2**30


@contextmanager
def measure_phase(phase: str) -> Iterator[dict[str, float]]:
    """Yield a dictionary that at the end holds the phase's cost.

    Keys: `timing_s/{phase}`; `perf/{phase}_memory_gib`, the most memory that tensors took on the GPU during the phase
    (without those of an engine that sleeps), or on CPU that the process ever took; and, where the caller has set
    `tokens` in the dictionary, `perf/{phase}_tokens_per_s` of this rank instead of it. Where this step is profiled, the
    phase is traced.
    """
    with PHASE_PROFILER.phase(phase):
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        metrics: dict[str, float] = {}
        start = time.perf_counter()
        yield metrics
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        metrics[f"timing_s/{phase}"] = seconds
        metrics[f"perf/{phase}_memory_gib"] = (
            torch.cuda.max_memory_allocated() - _asleep() if on_gpu else _peak_rss()
        ) / GIB
        if "tokens" in metrics:
            metrics[f"perf/{phase}_tokens_per_s"] = metrics.pop("tokens") / seconds


def _asleep() -> int:
    """Bytes of the tensors of a sleeping vLLM engine in this process: torch goes on counting what vLLM has unmapped."""
    cumem = sys.modules.get("vllm.device_allocator.cumem")
    if cumem is None or (allocator := cumem.CuMemAllocator.instance) is None:
        return 0
    # Weights and KV cache fill their blocks; those of graphs have little in them that torch counts.
    asleep = [data for data in allocator.pointer_to_data.values() if data.is_asleep]
    return sum(data.handle[1] for data in asleep if data.tag in cumem.DEFERRABLE_TAGS)


def _peak_rss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def tokens_of_rank(data: DataProto, sharers: int) -> float:
    """Tokens that a rank computes of rows that so many ranks share, of identical rows once."""
    rows = DistinctRows.of(data.batch).rows
    return float(data.batch["attention_mask"][rows].sum()) / sharers
