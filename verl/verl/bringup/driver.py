"""Torch, driver and compilers: what everything else stands on."""

from __future__ import annotations

import shutil
import time

import torch

from verl.bringup.step import Context, require, step

SIZE = {True: 8192, False: 256}
REPEATS = 10
GIB = 2**30
PRODUCT_ERROR = 0.01


@step(
    means="This build of torch cannot run kernels here. `nvidia-smi` names the driver: CUDA 13 builds need 580 or "
    "newer, CUDA 12 ones 525. Update the driver, or install another build of torch.",
    quick=True,
)
def torch_runs_kernels(context: Context) -> str:
    """A matrix product in bfloat16 that is right, and its speed."""
    if context.on_gpu:
        require(torch.cuda.is_available(), "torch.cuda.is_available() is false, although there is a GPU")
    size = SIZE[context.on_gpu]
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 512, generator=generator).bfloat16() for _ in range(2))
    wanted = left.double() @ right.double().T
    found = (left.to(context.device) @ right.to(context.device).T).cpu().double()
    error = float((found - wanted).abs().max() / wanted.abs().max())
    require(error < PRODUCT_ERROR, f"a product in bfloat16 is {error:.3g} off, relative to its largest value")
    square = torch.randn(size, size, device=context.device, dtype=torch.bfloat16)
    for _ in range(2):
        square @ square
    started = now()
    for _ in range(REPEATS):
        square @ square
    tflops = 2 * size**3 * REPEATS / (now() - started) / 1e12
    name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if context.on_gpu else "CPU"
    return f"{name}, torch {torch.__version__}: relative error {error:.2g}, {tflops:.3g} TFLOP/s in bfloat16"


@step(
    means="No C compiler: Triton's kernels, torch.compile (use_fused_kernels) and vLLM's graphs cannot be built. "
    "`apt install gcc g++`. nvcc and ninja are wanted by FlashInfer alone, which is switched off without them.",
    quick=True,
)
def compilers(context: Context) -> str:
    """Programs that build kernels at run time; only a C compiler is indispensable."""
    found = [name for name in ("gcc", "g++", "clang", "nvcc", "ninja") if shutil.which(name)]
    require(any(name in found for name in ("gcc", "g++", "clang")), "no C compiler in PATH")
    return f"found {', '.join(found)}"


def now() -> float:
    """Seconds, once the GPU has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
