"""The programs that kernels are compiled with while vLLM starts on a GPU: where they are, and what to do without."""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from xbai.errors import UserError

logger = logging.getLogger(__name__)

_CUDA_HOME = "/usr/local/cuda"
_INSTALL_NVCC = "install the CUDA toolkit and ninja, or run `vllm download-kernels`"


def search_path(path: str) -> str:
    """`PATH` and after it the folder of this environment's programs (`ninja`), which no one may have activated."""
    folders = [*path.split(os.pathsep), sysconfig.get_path("scripts")]
    return os.pathsep.join(dict.fromkeys(filter(None, folders)))


@dataclass(frozen=True)
class Toolchain:
    """What of the programs is missing here.

    Attributes:
        for_triton: what its launcher cannot be compiled without; every vLLM on a GPU needs that.
        for_flashinfer: what its kernels cannot be compiled without, where they are not installed compiled.
    """

    for_triton: tuple[str, ...]
    for_flashinfer: tuple[str, ...]

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Toolchain:
        """Look where Triton and FlashInfer do, in the environment of the process that is to run vLLM."""
        path = search_path(environment.get("PATH", ""))
        has_compiler = "CC" in environment or any(shutil.which(name, path=path) for name in ("gcc", "clang"))
        has_headers = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").is_file()
        nvcc = shutil.which("nvcc", path=path)
        cuda_home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
        cuda_home = cuda_home or (str(Path(nvcc).parents[1]) if nvcc else _CUDA_HOME)
        for_triton = {"a C compiler (gcc or clang)": has_compiler, "Python's headers (python3-dev)": has_headers}
        for_flashinfer = {
            f"nvcc ({cuda_home}/bin)": shutil.which(Path(cuda_home, "bin", "nvcc")),
            "ninja": shutil.which("ninja", path=path),
        }
        if find_spec("flashinfer_jit_cache") is not None:
            for_flashinfer = {}
        return cls(_missing(for_triton), _missing(for_flashinfer))

    def attention(self, capability: tuple[int, int], dtype: torch.dtype, options: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of vLLM's `EngineArgs`, beside the `options`, by which attention can do with what is here.

        Raises:
            UserError: it cannot, in one line.
        """
        if self.for_triton:
            raise UserError(
                f"vLLM: {_list(self.for_triton)} missing, which Triton compiles its launcher with; install it"
            )
        chosen = options.get("attention_backend")
        if not self.for_flashinfer or "attention_config" in options:
            return {}
        missing = f"{_list(self.for_flashinfer)} missing, which FlashInfer compiles its kernels with"
        if str(getattr(chosen, "name", chosen)).upper() == "FLASHINFER":
            raise UserError(f"attention_backend=FLASHINFER: {missing}; {_INSTALL_NVCC}, or leave the option out")
        if chosen is None and capability[0] == 10 and dtype != torch.float32:
            # The one generation for which vLLM prefers FlashInfer, without a look at what it needs; in float32, which
            # neither of the two computes, it takes Triton's kernels.
            logger.warning("attention is FlashAttention's: %s; for the faster one %s", missing, _INSTALL_NVCC)
            return {"attention_backend": "FLASH_ATTN"}
        return {}


def _missing(found: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(name for name, is_there in found.items() if not is_there)


def _list(names: tuple[str, ...]) -> str:
    return " and ".join(names) + (" is" if len(names) == 1 else " are")
