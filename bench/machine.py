"""What every benchmark says of the machine it ran on, and how it hands over its figures.

Importing it makes the repository's packages importable where they are not installed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "verl"), str(ROOT)]


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, accelerator and versions."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda}
    return found


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def rounded(value: Any) -> Any:
    """Four significant digits of every number that is not whole; names of text, as JSON has them."""
    if isinstance(value, dict):
        return {str(name): rounded(one) for name, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def report(result: dict[str, Any], out: Path) -> None:
    """Write the result as JSON, and print it as one line, the last."""
    from xbai.files import atomic_write

    with atomic_write(out, "w") as stream:
        json.dump(result, stream, indent=1)
        stream.write("\n")
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
