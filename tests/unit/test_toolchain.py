"""Which programs vLLM's kernels are compiled with, and what an engine does where some are missing."""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from xbai.engine.vllm import toolchain
from xbai.engine.vllm.toolchain import Toolchain, search_path
from xbai.errors import UserError

HOPPER, BLACKWELL = (9, 0), (10, 0)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for programs, the environment's own programs in `scripts`, and nothing else."""
    scripts = tmp_path / "scripts"
    include = tmp_path / "include"
    for folder in (scripts, include):
        folder.mkdir()
    (include / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme=None: str(tmp_path / name))
    monkeypatch.setattr(toolchain, "_CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    return tmp_path


def install(*programs: Path) -> None:
    for program in programs:
        program.parent.mkdir(parents=True, exist_ok=True)
        program.touch(mode=0o755)


def test_programs_of_an_environment_that_is_not_activated_are_found(machine: Path) -> None:
    install(machine / "scripts" / "ninja")
    for path in ("/nowhere:/neither", ""):
        assert shutil.which("ninja", path=search_path(path)) == str(machine / "scripts" / "ninja")
        assert search_path(path).startswith(path)
        assert search_path(search_path(path)) == search_path(path)
    # Not before the user's.
    install(machine / "bin" / "ninja")
    assert shutil.which("ninja", path=search_path(str(machine / "bin"))) == str(machine / "bin" / "ninja")


def test_what_is_missing_is_found(machine: Path) -> None:
    environment = {"PATH": str(machine / "bin")}
    found = Toolchain.of(environment)
    assert found.for_triton == ("a C compiler (gcc or clang)",)
    assert found.for_flashinfer == (f"nvcc ({machine}/cuda/bin)", "ninja")
    assert Toolchain.of({**environment, "CC": "/opt/cc"}).for_triton == ()
    install(machine / "bin" / "clang", machine / "scripts" / "ninja")
    found = Toolchain.of(environment)
    assert (found.for_triton, len(found.for_flashinfer)) == ((), 1)
    (machine / "include" / "Python.h").unlink()
    assert Toolchain.of(environment).for_triton == ("Python's headers (python3-dev)",)


@pytest.mark.parametrize("place", ["PATH", "CUDA_HOME", "CUDA_PATH", "default"])
def test_nvcc_is_looked_for_where_flashinfer_does(machine: Path, place: str) -> None:
    install(machine / "scripts" / "ninja")
    home = machine / ("cuda" if place == "default" else "toolkit")
    environment = {"PATH": str(machine / "toolkit" / "bin")} if place == "PATH" else {place: str(home)}
    assert Toolchain.of(environment).for_flashinfer == (f"nvcc ({machine / 'cuda' if place == 'PATH' else home}/bin)",)
    install(home / "bin" / "nvcc")
    assert Toolchain.of(environment).for_flashinfer == ()


def test_kernels_that_come_compiled_need_no_compiler(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Toolchain.of({}).for_flashinfer
    monkeypatch.setattr(toolchain, "find_spec", lambda name: name == "flashinfer_jit_cache" or None)
    assert Toolchain.of({}).for_flashinfer == ()


def test_no_gpu_starts_without_a_compiler() -> None:
    with pytest.raises(UserError, match=r"^vLLM: a C compiler .*and Python's headers.* are missing, which Triton"):
        Toolchain(("a C compiler (gcc or clang)", "Python's headers (python3-dev)"), ()).attention(
            HOPPER, torch.bfloat16, {}
        )


def test_attention_goes_without_flashinfer_where_it_cannot_be_compiled(caplog: pytest.LogCaptureFixture) -> None:
    complete, without = Toolchain((), ()), Toolchain((), ("nvcc (/usr/local/cuda/bin)",))
    for capability in ((8, 0), HOPPER, BLACKWELL, (12, 0)):
        assert complete.attention(capability, torch.bfloat16, {}) == {}
        assert complete.attention(capability, torch.bfloat16, {"attention_backend": "FLASHINFER"}) == {}
        assert without.attention(capability, torch.bfloat16, {"attention_backend": "TRITON_ATTN"}) == {}
        with pytest.raises(UserError, match=r"^attention_backend=FLASHINFER: nvcc \(.*\) is missing.*install"):
            without.attention(capability, torch.bfloat16, {"attention_backend": "flashinfer"})
        if capability != BLACKWELL:
            assert without.attention(capability, torch.bfloat16, {}) == {}
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert without.attention(BLACKWELL, torch.bfloat16, {}) == {"attention_backend": "FLASH_ATTN"}
    [record] = caplog.records
    assert "nvcc (/usr/local/cuda/bin) is missing" in record.getMessage()


@pytest.mark.slow
def test_no_backend_is_chosen_that_cannot_compute_in_float32() -> None:
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    without = Toolchain((), ("nvcc (/usr/local/cuda/bin)",))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        is_chosen = without.attention(BLACKWELL, dtype, {}) == {"attention_backend": "FLASH_ATTN"}
        assert is_chosen == FlashAttentionBackend.supports_dtype(dtype)


def test_this_machine_has_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    has_compiler = any(shutil.which(name) for name in ("gcc", "clang"))
    assert ("a C compiler (gcc or clang)" in Toolchain.of(os.environ).for_triton) != has_compiler
