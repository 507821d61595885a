"""Supervised fine-tuning of the LM on response tokens, and of the score head where rows carry an outcome label.

    torchrun --nproc_per_node=2 -m verl.trainer.main_sft [--config-name make10_sft] \
        data.train_files=... model.path=... trainer.output_dir=...

A run that was killed goes on from its last checkpoint when the same command is started again, and ends with the weights
of one that was not. The output folder appears whole at the end or not at all.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch.distributed as dist

from verl.distribution import check_distribution
from verl.models.fsdp import init_distributed
from verl.trainer.config.compose import compose_config
from verl.trainer.config.sft import check_sft_config
from verl.trainer.sft.trainer import SFTTrainer
from verl.utils.console import log_to_console
from xbai.errors import UserError, exit_on_user_error
from xbai.sandbox.libc import PR_SET_PDEATHSIG, prctl

FIRST_RANK_GRACE_S = 2.0


@contextmanager
def first_rank_speaks() -> Iterator[None]:
    """Leave a `UserError`, which all ranks of a machine run into alike, to the first of them to say.

    torchrun ends every rank as soon as one has ended, so the others give the first one time.
    """
    try:
        yield
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        time.sleep(FIRST_RANK_GRACE_S)
        raise SystemExit(2) from None


def end_with_torchrun() -> None:
    """Be killed as soon as torchrun has been: left to itself this rank would train on beside the next start."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@exit_on_user_error
@first_rank_speaks()
def main() -> None:
    """Entry point of every rank that torchrun starts; without torchrun, one rank."""
    check_distribution()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-name", default="sft_trainer", help="a file of verl/trainer/config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")
    arguments = parser.parse_args()
    for variable, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(variable, value)
    end_with_torchrun()
    log_to_console(logging.INFO if os.environ["RANK"] == "0" else logging.WARNING)
    config = check_sft_config(compose_config(arguments.config_name, arguments.overrides))
    device = init_distributed(config.trainer.nccl_timeout)
    try:
        trainer = SFTTrainer(config, device)
        if trainer.is_finished:
            trainer.end_without_training()
        else:
            trainer.init_model()
            trainer.fit()
    finally:
        dist.destroy_process_group()


def leave() -> NoReturn:
    """End this process, whose work is done, without taking the interpreter apart.

    Threads of gloo that are about to let go of a tensor would meet the interpreter's end and abort the process:
    https://github.com/pytorch/pytorch/issues/190489.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
    leave()
