"""Which GPUs each copy of a model gets. Without torch, which would take seconds to import and open all of them."""

from __future__ import annotations

import os
import subprocess

from xbai.errors import UserError

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
LIST_GPUS = ("nvidia-smi", "--list-gpus")
LIST_TIMEOUT_S = 60.0


def gpu_shares(replicas: int, tensor_parallel_size: int) -> list[str | None]:
    """`CUDA_VISIBLE_DEVICES` of each copy: as many GPUs as share a model, none of them twice; None on a CPU.

    Raises:
        UserError: there are too few.
    """
    gpus = _visible_gpus()
    if not gpus:
        return [None] * replicas
    if (needed := replicas * tensor_parallel_size) > len(gpus):
        raise UserError(
            f"--replicas {replicas}: with {tensor_parallel_size} each they need {needed} GPUs, and {len(gpus)} are "
            f"visible ({','.join(gpus)}); start fewer, or set {VISIBLE_GPUS}"
        )
    starts = range(0, needed, tensor_parallel_size)
    return [",".join(gpus[start : start + tensor_parallel_size]) for start in starts]


def _visible_gpus() -> list[str]:
    if (visible := os.environ.get(VISIBLE_GPUS)) is not None:
        names = [name.strip() for name in visible.split(",")]
        # As CUDA reads it: what is no GPU ends the list.
        ends = [place for place, name in enumerate(names) if name in ("", "-1")]
        return names[: min(ends, default=len(names))]
    try:
        listed = subprocess.run(LIST_GPUS, capture_output=True, text=True, timeout=LIST_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    # Its parts (MIG) stand below a GPU, indented.
    return [str(number) for number in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]
