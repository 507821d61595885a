"""What a phase cost: memory that torch goes on counting while vLLM's engine sleeps is not the phase's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from verl.workers.phase_metrics import GIB, measure_phase


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for a GPU of which torch counts 60 GiB as allocated."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 60 * GIB)
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)


@pytest.mark.slow
def test_a_sleeping_engine_takes_no_memory_of_a_phase(gpu: None, monkeypatch: pytest.MonkeyPatch):
    from vllm.device_allocator.cumem import AllocationData, CuMemAllocator

    sizes = {"weights": 3, "kv_cache": 50, "cudagraph": 1}
    blocks = [AllocationData((0, size * GIB, 2**40 + size, []), tag) for tag, size in sizes.items()]
    allocator = SimpleNamespace(pointer_to_data={block.handle[2]: block for block in blocks})
    for instance, awake, expected in ((None, True, 60), (allocator, True, 60), (allocator, False, 7)):
        monkeypatch.setattr(CuMemAllocator, "instance", instance)
        for block in blocks:
            block.is_asleep = not awake
        with measure_phase("update_actor") as metrics:
            pass
        assert metrics["perf/update_actor_memory_gib"] == expected
