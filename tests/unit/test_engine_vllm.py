"""What vLLM is started with; what it then does is the contract tests' to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from xbai.engine.files import ModelOptions
from xbai.engine.vllm import engine as vllm
from xbai.engine.vllm import start as vllm_start
from xbai.engine.vllm.engine import VLLMEngine
from xbai.errors import UserError


class StartedError(Exception):
    """Carries the arguments of a start that the test needs no further."""


@pytest.fixture(autouse=True)
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(arguments: dict[str, Any]) -> None:
        raise StartedError(arguments)

    monkeypatch.setattr(vllm, "start", stop)
    # An engine that an earlier test left open has a process group.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, as far as a start asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (90, 100))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("CC", "cc")


def start_arguments(folder: Path, model: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    with pytest.raises(StartedError) as started:
        VLLMEngine(ModelOptions(folder, **(model or {})), **options)
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


def test_a_gpu_gets_the_batches_that_vllm_takes_for_it(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, hopper: None
) -> None:
    for on_gpu, seqs, tokens in ((False, 128, 8192), (True, None, None)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda on_gpu=on_gpu: on_gpu)
        arguments = start_arguments(tiny_model_dir)
        assert (arguments.get("max_num_seqs"), arguments.get("max_num_batched_tokens")) == (seqs, tokens)
        arguments = start_arguments(tiny_model_dir, max_num_seqs=4, max_num_batched_tokens=10000)
        assert (arguments["max_num_seqs"], arguments["max_num_batched_tokens"]) == (4, 10000)


def test_only_a_trainers_engine_sleeps_unless_told_to(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, hopper: None
) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for among_ranks in (False, True):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda among_ranks=among_ranks: among_ranks)
        assert start_arguments(tiny_model_dir)["enable_sleep_mode"] == among_ranks
        for wanted in (False, True):
            assert start_arguments(tiny_model_dir, enable_sleep_mode=wanted)["enable_sleep_mode"] == wanted
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "enable_sleep_mode" not in start_arguments(tiny_model_dir, enable_sleep_mode=True), "vLLM refuses it on CPU"


def test_an_engine_that_was_not_loaded_to_sleep_says_so() -> None:
    engine = VLLMEngine.__new__(VLLMEngine)
    engine._on_cpu = False
    engine._llm = Mock()
    engine._llm.vllm_config.model_config.enable_sleep_mode = False
    with pytest.raises(UserError, match=r"^sleep: .* load it with enable_sleep_mode=True"):
        engine.sleep(1)
    engine._llm.sleep.assert_not_called()
    engine._llm.vllm_config.model_config.enable_sleep_mode = True
    engine.sleep(1)
    engine._llm.sleep.assert_called_once_with(level=1)


@pytest.mark.parametrize(("on_gpu", "usual"), [(False, "bfloat16"), (True, "float32")])
def test_vllm_is_told_the_dtype_of_the_logits(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, hopper: None, on_gpu: bool, usual: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)

    def overrides(model: dict[str, Any], **options: Any) -> dict[str, Any]:
        return start_arguments(tiny_model_dir, {"dtype": "bfloat16"} | model, **options)["hf_overrides"]

    for with_scores in (False, True):
        for head_dtype, expected in ((None, usual), ("model", "bfloat16"), ("float32", "float32")):
            model = {"with_scores": with_scores, "head_dtype": head_dtype}
            assert overrides(model)["head_dtype"] == expected
    assert overrides({"with_scores": True}, hf_overrides={"rope_theta": 1.0}).keys() == {
        *("head_dtype", "rope_theta", "architectures")
    }


def test_a_gpu_without_a_compiler_is_refused_before_the_model_loads(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, hopper: None
) -> None:
    assert "attention_backend" not in start_arguments(tiny_model_dir)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC")
    with pytest.raises(UserError, match=r"^vLLM: a C compiler .* missing"):
        VLLMEngine(ModelOptions(tiny_model_dir))


def test_nothing_is_compiled_for_a_sampler_that_seeds_bypass(monkeypatch: pytest.MonkeyPatch) -> None:
    envs = pytest.importorskip("vllm.envs")
    monkeypatch.setattr(vllm_start, "_construct", lambda arguments: None)
    for given, used in ((None, False), ("1", True)):
        monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER", raising=False)
        if given is not None:
            monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", given)
        vllm_start.start({})
        assert envs.environment_variables["VLLM_USE_FLASHINFER_SAMPLER"]() == used


def test_triton_computes_a_float32_model_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton.knobs")
    for name in (*vllm_start._REQUIRED_ENVIRONMENT, *vllm_start._DEFAULT_ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(vllm_start, "_construct", lambda arguments: None)
    vllm_start.start({})
    assert knobs.language.fp32_default == "ieee"
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32")
    vllm_start.start({})
    assert knobs.language.fp32_default == "tf32"


def test_ranks_that_do_not_divide_into_engines_are_refused(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    assert start_arguments(tiny_model_dir, tensor_parallel_size=4)["tensor_parallel_size"] == 4
    with pytest.raises(UserError, match="tensor_parallel_size=3 must divide the 4 ranks"):
        VLLMEngine(ModelOptions(tiny_model_dir), tensor_parallel_size=3)


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
        VLLMEngine(ModelOptions(tiny_model_dir), **options)
