"""vLLM's worker in a process that torch.distributed joins with others already; to be imported on demand, like vLLM."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import distributed as dist
from vllm.distributed.parallel_state import GroupCoordinator, get_tp_group
from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher


class RankExecutor(ExecutorWithExternalLauncher):
    """One worker, in this process, as a rank of the process group that is there.

    vLLM cuts the ranks into groups of `tensor_parallel_size` consecutive ones. The engines of a group each schedule for
    themselves and meet only inside the model, so all of them must get the same requests in the same order.
    """

    def _init_executor(self) -> None:
        super()._init_executor()
        _unlink_shared_memory(get_tp_group())

    def _distributed_args(self) -> tuple[str, int, int]:
        # The address is not connected to. On CPU its last part names the shared memory of a tensor-parallel group,
        # which other jobs on the machine must not share: vLLM's own `env://` is the same name for all of them.
        job = os.environ.get("MASTER_PORT", os.getppid())
        # Not LOCAL_RANK: where a launcher shows each process one GPU, that one has index 0.
        device = torch.cuda.current_device() if torch.cuda.is_available() else 0
        return f"tcp://localhost:{job}", dist.get_rank(), device


def _unlink_shared_memory(group: GroupCoordinator) -> None:
    """Have the segments of a tensor-parallel group, open in all its ranks by now, go with the last rank.

    A trainer's processes end by a signal and clean nothing up, and each run would leave its segments to the machine.
    """
    queue = group.mq_broadcaster
    if queue is not None and queue.buffer.is_creator:
        queue.buffer.shared_memory.unlink()
        queue.buffer.is_creator = False
    name = getattr(getattr(group.device_communicator, "dist_module", None), "group_name", None)
    if name is not None:
        # Gone already where an earlier engine of these ranks had the group.
        Path("/dev/shm", f"{name}_{group.rank_in_group}").unlink(missing_ok=True)
