"""The Ray cluster of a run: joined, or started on this machine; and what its nodes must have in common."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from pathlib import Path

import ray
from ray._common.utils import get_default_system_temp_dir

from verl.single_controller import RayResourcePool
from verl.single_controller.nodes import answers_by_node
from verl.single_controller.orphans import end_orphans, own_session
from verl.trainer.config.machine import on_cluster
from verl.trainer.config.schema import PPOConfig
from verl.trainer.ppo.ray_head import check_head, find_head
from xbai.errors import UserError

logger = logging.getLogger(__name__)

QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "TQDM_DISABLE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Environment of the workers, unless set: their chatter would bury the progress."""

ON_GPU = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""Of workers with a GPU, unless set: packed micro-batches differ in length, which leaves fixed segments full of holes.

vLLM's sleep pool switches them off for what it allocates (`CuMemAllocator.use_memory_pool`), and its custom all-reduce,
which cannot share such memory, is off wherever an engine runs on several ranks.
"""

INHERITED = (
    *("CUDA_", "CUBLAS_", "NCCL_", "GLOO_", "LD_LIBRARY_PATH"),
    *("PYTORCH_", "TORCH_NCCL_", "TORCH_DISTRIBUTED_", "TORCHINDUCTOR_", "TRITON_"),
    *("VLLM_", "HF_HUB_", "TOKENIZERS_", "WANDB_", *QUIET),
)
"""Workers get the driver's variables that begin so, on every node."""
OF_EACH_WORKER = ("CUDA_VISIBLE_DEVICES",)
"""Not these, which Ray sets."""
SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD")
"""Not those that end so: Ray shows and logs the variables that it sets, and no worker logs in anywhere."""
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""torch reads the first of them that is set."""


def worker_env(on_gpu: bool) -> dict[str, str]:
    """Environment variables of the worker processes on every node."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(INHERITED) and not name.endswith(SECRETS) and name not in OF_EACH_WORKER
    }
    if not on_gpu:
        return QUIET | inherited | {"CUDA_VISIBLE_DEVICES": ""}
    return QUIET | ({} if inherited.keys() & ALLOCATOR else ON_GPU) | inherited


def start_ray(config: PPOConfig) -> None:
    """Join the cluster that `RAY_ADDRESS` names, or that several nodes imply; otherwise start one on this machine."""
    trainer = config.trainer
    if on_cluster(trainer):
        _join_cluster(os.environ.get("RAY_ADDRESS") or "auto")
        return
    num_cpus = config.ray_init.num_cpus
    if num_cpus is None and trainer.device == "cpu":
        # Processes on CPU may be more than the cores; Ray must not wait for cores that will never be there.
        num_cpus = max(os.cpu_count() or 1, trainer.n_gpus_per_node + trainer.rollout_gpus_per_node)
    folder = get_default_system_temp_dir()
    if not Path(folder).is_absolute():
        raise UserError(
            f"{folder!r} (RAY_TMPDIR, or else TMPDIR) is no whole path, which Ray needs; set RAY_TMPDIR=/tmp"
        )
    run_folder = Path(trainer.default_local_dir)
    end_orphans(run_folder)
    # Ray warns that the cluster has a token, as it has by default.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    try:
        # Without an address Ray would join any cluster that it finds on this machine.
        started = ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, logging_level=logging.WARNING)
    except Exception as error:
        # Ray raises what it likes, plain `Exception`s among it.
        raise UserError(_why_not_started(error, folder)) from error
    session = started.address_info["session_dir"]  # type: ignore[attr-defined]  # Of a driver that is no Ray client.
    own_session(Path(session), run_folder)


def check_shared_folder(folder: str | Path, pool: RayResourcePool) -> None:
    """Raise a `UserError` unless every node of `pool` sees, and may change, what this machine writes into `folder`."""
    folder, content = Path(folder).resolve(), secrets.token_hex()
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe_{secrets.token_hex(4)}"
    probe.write_text(content, encoding="utf-8")
    try:
        asked = {
            node.address: _sees.options(scheduling_strategy=node.strategies[0]).remote(probe, content)
            for node in pool.nodes()
        }
        seen = answers_by_node(asked)
    finally:
        probe.unlink()
    if blind := [address for address, sees in zip(asked, seen, strict=True) if not sees]:
        raise UserError(
            f"trainer.default_local_dir={folder}: {', '.join(blind)} cannot see or change what the driver writes "
            "there; checkpoints need a folder that all nodes share, under the same path"
        )


def lost_head() -> str | None:
    """The address of the cluster's head, if that does not answer any more: it takes workers on all nodes with it."""
    if not ray.is_initialized():
        return None
    address = ray.get_runtime_context().gcs_address
    try:
        check_head(address)
    except ConnectionError:
        return address
    return None


def _why_not_started(error: Exception, folder: str) -> str:
    """What keeps Ray from starting on this machine, with its files in `folder`, and what to do."""
    if "AF_UNIX path length" in str(error):
        return (
            f"Ray cannot start: the name of the folder for its files, {folder} (RAY_TMPDIR, or else TMPDIR), is too "
            "long for its sockets, whose paths have at most 107 bytes; set a short one, such as RAY_TMPDIR=/tmp"
        )
    if isinstance(error, OSError) and str(error.filename).startswith(str(Path(folder, "ray"))):
        return (
            f"Ray cannot start: {error.filename}: {error.strerror}; set RAY_TMPDIR to a folder that can be written to"
        )
    free = shutil.disk_usage(folder).free / 2**30
    return (
        f"Ray cannot start: {_first_sentence(error)}; its files are in {folder}, which has {free:.2f} GiB free (set "
        f"RAY_TMPDIR to another folder where that is too little), its logs in {folder}/ray/session_latest/logs"
    )


def _first_sentence(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(". ")[0].rstrip(".")


@ray.remote(num_cpus=0)
def _sees(probe: Path, content: str) -> bool:
    try:
        return probe.read_text(encoding="utf-8") == content and os.access(probe.parent, os.W_OK)
    except OSError:
        return False


def _join_cluster(address: str) -> None:
    """`ray.init`, but a `UserError` within seconds where Ray waits minutes for a head that does not answer."""
    if "://" in address:
        raise UserError(f"RAY_ADDRESS={address}: Ray Client cannot drive a run; start it on a node, with HOST:PORT")
    # How often `ray.init` tries: once, for the head has just answered. Where it went away since, each time takes 41 s.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
    try:
        check_head(find_head(address))
        ray.init(address=address, logging_level=logging.WARNING)
    except Exception as error:
        # Ray raises what it likes, plain `Exception`s among it.
        raise UserError(
            f"RAY_ADDRESS={address}: no Ray cluster answers; run this on the head node of one "
            f"(verl/examples/ray/run_worker_n.sh starts it): {_first_sentence(error)}"
        ) from error
