"""What the steps before have left behind."""

from __future__ import annotations

import time

from verl.bringup.machine import used_mib
from verl.bringup.step import Context, require, step

LEFT_MIB = 1024
PATIENCE_S = 20.0


@step(
    means="Memory of a GPU is still taken after all processes of the steps have ended: `nvidia-smi` names who has it. "
    "A worker that outlives its run makes the next one fail for want of memory.",
    needs=["gpu", "memory in use"],
    quick=True,
)
def memory_is_free(context: Context) -> str:
    """Every GPU has as much free memory as before the first step."""
    deadline = time.monotonic() + PATIENCE_S
    while (left := _left(context)) > LEFT_MIB and time.monotonic() < deadline:
        time.sleep(0.5)
    require(left <= LEFT_MIB, f"{left} MiB more are in use than before the first step")
    return f"{left} MiB more in use than before the first step"


def _left(context: Context) -> int:
    return max(0, *(after - before for after, before in zip(used_mib(), context.used_mib, strict=True)))
