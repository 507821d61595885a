"""What vLLM is started with; what it then does is the contract tests' to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from xbai.engine import vllm as vllm_module
from xbai.engine.vllm import VLLMEngine
from xbai.engine.vllm import _start as start
from xbai.errors import UserError


class StartedError(Exception):
    """Carries the arguments of a start that the test needs no further."""


@pytest.fixture(autouse=True)
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(arguments: dict[str, Any]) -> None:
        raise StartedError(arguments)

    monkeypatch.setattr(vllm_module, "_start", stop)
    # An engine that an earlier test left open has a process group.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)


def start_arguments(folder: Path, **options: Any) -> dict[str, Any]:
    with pytest.raises(StartedError) as started:
        VLLMEngine(folder, **options)
    return started.value.args[0]


def test_unseeded_requests_differ_between_processes_but_not_between_ranks(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len({start_arguments(tiny_model_dir)["seed"] for _ in range(4)}) == 4
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert {start_arguments(tiny_model_dir)["seed"] for _ in range(4)} == {0}


def test_the_weights_are_shared_by_as_many_processes_as_asked(tiny_model_dir: Path) -> None:
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, or none")
    assert start_arguments(tiny_model_dir)["distributed_executor_backend"] == "uni"
    shared = start_arguments(tiny_model_dir, tensor_parallel_size=2)
    assert shared["tensor_parallel_size"] == 2
    assert "distributed_executor_backend" not in shared


def test_a_gpu_gets_the_batches_that_vllm_takes_for_it(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (90, 100))
    for on_gpu, seqs, tokens in ((False, 128, 8192), (True, None, None)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda on_gpu=on_gpu: on_gpu)
        arguments = start_arguments(tiny_model_dir)
        assert (arguments.get("max_num_seqs"), arguments.get("max_num_batched_tokens")) == (seqs, tokens)
        arguments = start_arguments(tiny_model_dir, max_num_seqs=4, max_num_batched_tokens=10000)
        assert (arguments["max_num_seqs"], arguments["max_num_batched_tokens"]) == (4, 10000)


def test_triton_computes_a_float32_model_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton.knobs")
    for name in (*vllm_module._REQUIRED_ENVIRONMENT, *vllm_module._DEFAULT_ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(vllm_module, "_construct", lambda arguments: None)
    start({})
    assert knobs.language.fp32_default == "ieee"
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32")
    start({})
    assert knobs.language.fp32_default == "tf32"


def test_ranks_that_do_not_divide_into_engines_are_refused(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    assert start_arguments(tiny_model_dir, tensor_parallel_size=4)["tensor_parallel_size"] == 4
    with pytest.raises(UserError, match="tensor_parallel_size=3 must divide the 4 ranks"):
        VLLMEngine(tiny_model_dir, tensor_parallel_size=3)


@pytest.mark.parametrize(
    ("gpus", "options", "message"),
    [
        (0, {"gpu_memory_utilization": 0.5}, "gpu_memory_utilization: there is no GPU here"),
        (2, {"tensor_parallel_size": 4}, "tensor_parallel_size=4: only 2 GPUs here"),
    ],
)
def test_options_for_gpus_that_are_not_there_are_refused(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=message):
        VLLMEngine(tiny_model_dir, **options)
