"""What vLLM is started with; what it then does is the contract tests' to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from xbai.engine import vllm as vllm_module
from xbai.engine.vllm import VLLMEngine


class StartedError(Exception):
    """Carries the arguments of a start that the test needs no further."""


@pytest.fixture(autouse=True)
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(arguments: dict[str, Any]) -> None:
        raise StartedError(arguments)

    monkeypatch.setattr(vllm_module, "_start", start)


def start_arguments(folder: Path, **options: Any) -> dict[str, Any]:
    with pytest.raises(StartedError) as started:
        VLLMEngine(folder, **options)
    return started.value.args[0]


def test_unseeded_requests_differ_between_processes_but_not_between_ranks(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len({start_arguments(tiny_model_dir)["seed"] for _ in range(4)}) == 4
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert {start_arguments(tiny_model_dir)["seed"] for _ in range(4)} == {0}
