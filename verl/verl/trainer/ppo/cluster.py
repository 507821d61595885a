"""The Ray cluster of a run: joined, or started on this machine."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

import ray
from omegaconf import DictConfig

from xbai.errors import UserError

QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "TQDM_DISABLE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Environment of the workers, unless set: their chatter would bury the progress."""


def worker_env(on_gpu: bool) -> dict[str, str]:
    """Environment variables of the worker processes on every node."""
    env = {name: os.environ.get(name, value) for name, value in QUIET.items()}
    return env if on_gpu else env | {"CUDA_VISIBLE_DEVICES": ""}


def start_ray(config: DictConfig) -> None:
    """Join the cluster that `RAY_ADDRESS` names, or that several nodes imply; otherwise start one on this machine."""
    options: dict[str, Any] = {"logging_level": logging.WARNING}
    trainer = config.trainer
    if os.environ.get("RAY_ADDRESS") or trainer.nnodes > 1:
        _join_cluster(os.environ.get("RAY_ADDRESS", "auto"), options)
        return
    num_cpus = config.ray_init.num_cpus
    if num_cpus is None and trainer.device == "cpu":
        # Processes on CPU may be more than the cores; Ray must not wait for cores that will never be there.
        num_cpus = max(os.cpu_count() or 1, trainer.n_gpus_per_node)
    # Without an address Ray would join any cluster that it finds on this machine.
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **options)


def _join_cluster(address: str, options: dict[str, Any]) -> None:
    """`ray.init`, but a `UserError` at once where Ray waits minutes for a head node that does not answer."""
    try:
        if address not in ("auto", "local") and "://" not in address:
            host, _, port = address.rpartition(":")
            socket.create_connection((host, port), timeout=10).close()
        ray.init(address=address, **options)
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS={address}: no Ray cluster answers; run this on the head node of one "
            f"(verl/examples/ray/run_worker_n.sh starts it): {str(error).partition('.')[0]}"
        ) from error
