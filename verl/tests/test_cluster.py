"""Joining a Ray cluster: what answers may be no head, another's head, or too small; each is one line within seconds."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import ray
from omegaconf import OmegaConf

from verl.trainer.ppo import ray_head
from verl.trainer.ppo.cluster import start_ray, worker_env
from xbai.errors import UserError

CLUSTER = """
import json, sys
import ray

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
(node,) = ray.nodes()
ports = {
    "head": int(ray.get_runtime_context().gcs_address.rpartition(":")[2]),
    "node manager": node["NodeManagerPort"],
    "object manager": node["ObjectManagerPort"],
    "metrics": node["MetricsExportPort"],
}
sys.stdout.write(json.dumps(ports) + "\\n")
sys.stdout.flush()
sys.stdin.read()
"""


INHERITED = {
    "CUDA_LAUNCH_BLOCKING": "1",
    "CUDA_HOME": "/opt/cuda",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "0",
    "TRITON_CACHE_DIR": "/scratch/triton",
    "NCCL_DEBUG": "WARN",
    "LD_LIBRARY_PATH": "/opt/cuda/lib64",
}


def test_workers_on_every_node_get_what_the_driver_sets(monkeypatch: pytest.MonkeyPatch):
    for name, value in {**INHERITED, "CUDA_VISIBLE_DEVICES": "3", "WANDB_API_KEY": "secret", "OTHER": "1"}.items():
        monkeypatch.setenv(name, value)
    for on_gpu in (True, False):
        environment = worker_env(on_gpu)
        assert INHERITED.items() <= environment.items()
        assert not {"WANDB_API_KEY", "OTHER"} & environment.keys()
    assert "CUDA_VISIBLE_DEVICES" not in worker_env(on_gpu=True), "Ray gives each worker its own"
    assert worker_env(on_gpu=False)["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_of_gpu_memory_grow_unless_the_user_says_how(monkeypatch: pytest.MonkeyPatch, name: str):
    for each in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(each, raising=False)
    assert worker_env(on_gpu=True)["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in worker_env(on_gpu=False)
    monkeypatch.setenv(name, "max_split_size_mb:512")
    settings = {key: value for key, value in worker_env(on_gpu=True).items() if "ALLOC_CONF" in key}
    assert settings == {name: "max_split_size_mb:512"}


RUN_HEAD = Path(__file__).parents[2] / "verl/examples/ray/run_head.sh"
LONG_NAME = "scratch_folder_as_batch_systems_name_them/user_name_0123/job_1355700/tmp.t0016"
START_HERE = """
import sys
import ray
from omegaconf import OmegaConf
from verl.trainer.ppo.cluster import start_ray
from xbai.errors import exit_on_user_error

exit_on_user_error(start_ray)(
    OmegaConf.create({
        "trainer": {"nnodes": 1, "device": "cpu", "n_gpus_per_node": 1, "default_local_dir": "checkpoints"},
        "ray_init": {"num_cpus": 1},
    })
)
sys.stdout.write(ray.get(ray.remote(lambda: "a task ran").remote()))
"""


@pytest.fixture
def start_here(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`start_here(NAME=value, ...)`: a process of these variables that starts Ray and runs a task."""
    (tmp_path / "file").touch()
    (tmp_path / LONG_NAME).mkdir(parents=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}

    def start(**variables: str) -> subprocess.CompletedProcess[str]:
        command, environment = [sys.executable, "-c", START_HERE], inherited | {"RAY_USAGE_STATS_ENABLED": "0"}
        return subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=240)

    return start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        pytest.param(
            {"TMPDIR": f"{{folder}}/{LONG_NAME}"},
            "(RAY_TMPDIR, or else TMPDIR), is too long for its sockets",
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"RAY_TMPDIR": "{folder}/file"},
            "{folder}/file/ray: Not a directory; set RAY_TMPDIR to a folder that can be",
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"HOME": "{folder}/file", "RAY_AUTH_MODE": "token"},
            "Ray cannot start: [Errno 20] Not a directory: '{folder}/",
            marks=pytest.mark.long,
        ),
        ({"RAY_AUTH_TOKEN_PATH": "{folder}/none"}, "RAY_AUTH_TOKEN_PATH is set but file cannot be opened"),
    ],
)
def test_why_ray_does_not_start_here_is_one_line(variables, said, start_here, tmp_path: Path):
    done = start_here(**{name: value.format(folder=tmp_path) for name, value in variables.items()})
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert said.format(folder=tmp_path) in done.stderr


def test_a_folder_for_ray_is_a_whole_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "scratch")
    config = {"trainer": {"nnodes": 1, "device": "cpu", "n_gpus_per_node": 1}, "ray_init": {"num_cpus": 1}}
    with pytest.raises(UserError, match=r"^'scratch' \(RAY_TMPDIR, or else TMPDIR\) is no whole path, which Ray needs"):
        start_ray(OmegaConf.create(config))


@pytest.mark.long
def test_a_short_folder_for_ray_is_all_that_a_long_tmpdir_needs(start_here, tmp_path: Path):
    done = start_here(TMPDIR=f"{tmp_path}/{LONG_NAME}", RAY_TMPDIR="/tmp")
    assert (done.returncode, done.stdout) == (0, "a task ran"), done.stderr


def test_a_head_does_not_start_in_a_folder_of_a_long_name(tmp_path: Path):
    environment = {**os.environ, "RAY_TMPDIR": f"{tmp_path}/{LONG_NAME}", "HOME": str(tmp_path)}
    done = subprocess.run(["bash", str(RUN_HEAD)], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.endswith("is too long a name for Ray's sockets; set RAY_TMPDIR=/tmp\n")
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class OtherCluster:
    """A cluster of another user's on this machine: one CPU, and a token of its own."""

    address_of: dict[str, str]
    environment: dict[str, str]


@pytest.fixture(scope="module")
def other_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OtherCluster]:
    variables = {"HOME": str(tmp_path_factory.mktemp("home")), "RAY_AUTH_MODE": "token"}
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env={**os.environ, **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    ports = json.loads(process.stdout.readline())
    yield OtherCluster({name: f"127.0.0.1:{port}" for name, port in ports.items()}, variables)
    process.communicate("", timeout=120)


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """`refusal(address) -> the error of a run that is to join the cluster there`, known within seconds."""

    def join(address: str) -> str:
        monkeypatch.setenv("RAY_ADDRESS", address)
        started = time.monotonic()
        with pytest.raises(UserError) as error:
            start_ray(OmegaConf.create({"trainer": {"nnodes": 1}}))
        assert time.monotonic() - started < 60
        assert not ray.is_initialized()
        assert str(error.value).startswith(f"RAY_ADDRESS={address}: no Ray cluster answers; run this on the head node")
        return str(error.value)

    return join


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Nobody else can listen at its port, and nobody does."""
    with socket.socket() as reserved:
        reserved.bind(("", 0))
        yield reserved


def address_of(listener: socket.socket) -> str:
    return f"127.0.0.1:{listener.getsockname()[1]}"


def test_where_nothing_listens(refusal, listener: socket.socket):
    assert "nothing that is a Ray head answers there" in refusal(address_of(listener))


def test_what_listens_on_the_loopback_alone_is_not_where_ray_looks(refusal):
    if ray.util.get_node_ip_address() == "127.0.0.1":
        pytest.skip("this machine has no other address")
    # With a server at 127.0.0.1 as proof of a head, `ray.init` would try the machine's other address for 13 minutes.
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert "nothing that is a Ray head answers there" in refusal(address_of(server))


@pytest.mark.parametrize("answers", [True, False])
def test_a_grpc_server_that_is_no_head(refusal, monkeypatch: pytest.MonkeyPatch, answers: bool):
    class Hanging(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(lambda request, context: time.sleep(3))

    if not answers:
        monkeypatch.setattr(ray_head, "ANSWER_TIMEOUT_S", 1.0)
    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[] if answers else [Hanging()])
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    try:
        said = refusal(f"127.0.0.1:{port}")
        assert ("but no head" if answers else "no answer from there within") in said
    finally:
        server.stop(None).wait()


def test_an_address_that_is_none(refusal):
    assert "Invalid address format: nowhere" in refusal("nowhere")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("node manager", "what answers there is a process of Ray or another gRPC service, but no head"),
        ("object manager", "what answers there is a process of Ray or another gRPC service, but no head"),
        ("metrics", "nothing that is a Ray head answers there"),
        ("head", "the head there wants another token than this process has"),
    ],
)
def test_a_port_of_another_cluster(refusal, other_cluster: OtherCluster, name: str, said: str):
    assert said in refusal(other_cluster.address_of[name])


@pytest.mark.slow
def test_a_cluster_that_is_too_small_is_named(other_cluster: OtherCluster, small_run: list[str], tmp_path: Path):
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *small_run, f"trainer.default_local_dir={tmp_path}"]
    environment = {**os.environ, **other_cluster.environment, "RAY_ADDRESS": other_cluster.address_of["head"]}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert re.match(r"error: Ray has no room for \[2\] processes .*; it has 1 node: [\d.]+ \(1 CPU\); free are", last)
    assert "Traceback" not in ended.stderr
