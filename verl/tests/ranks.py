"""`python ranks.py RANKS PROGRAM [ARGUMENTS]`: run a program on several ranks of this machine, as torchrun does.

The ranks are forked from a process that has imported what the program imports, so that they pay for it once, and not
the five seconds of torch and transformers each.
"""

from __future__ import annotations

import os
import runpy
import sys

# Asked in the usual way whether there is a GPU, CUDA cannot be used any more in forked processes.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

from torch.distributed import TCPStore
from torch.multiprocessing import start_processes


def run_rank(rank: int, program: list[str]) -> None:
    """Be one of the ranks."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv = program
    runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    ranks, *program = sys.argv[1:]
    runpy.run_path(program[0])
    # Here, as in torchrun's agent, so that nobody can take the port before the first rank listens there.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ.update(
        WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True"
    )
    start_processes(run_rank, (program,), nprocs=int(ranks), start_method="fork")
