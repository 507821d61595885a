"""Two machines, as far as the trainer can tell: network, process and mount namespaces with the real launch scripts.

The world is one process namespace; its first machine, `node-a`, is the Ray head. `node-b` lives inside it, behind a
port of a bridge, so that it can be killed or unplugged. Ending the world's first process ends everything at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tiny import lasting

from verl.checkpoints.folder import LATEST_FILE
from verl.utils.tracking import METRICS_FILE

pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).parents[2]
HEAD, WORKER = "node-a", "node-b"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONPATH": f"{REPOSITORY}/verl:{REPOSITORY}",
}
ADDRESSES = {HEAD: "10.77.0.1", WORKER: "10.77.0.2"}

# A second network that carries the default route: whoever does not ask Ray for the address takes this one.
MACHINE = """
set -e
hostname {name}
mount -t tmpfs tmpfs /tmp/ray
ip link set lo up
ip link add decoy type veth peer name decoy_end
ip address add 192.168.77.1/24 dev decoy
ip link set decoy up && ip link set decoy_end up
ip route add default via 192.168.77.9 onlink dev decoy
{network}
touch {folder}/{name}.up
trap : TERM
while :; do sleep 1000 & wait; done
"""
BRIDGE = """
ip link add bridge type bridge
ip address add {address}/24 dev bridge
ip link set bridge up
"""
UNSHARE = "unshare --net --pid --uts --mount --mount-proc --fork --kill-child"
FAKE_SSH = """#!/usr/bin/env bash
while [[ $1 == -o ]]; do shift 2; done
host=${{1/#{worker_address}/{worker}}}; shift
pid=$(cat {folder}/"$host".pid 2>/dev/null) || {{ echo "ssh: Could not resolve hostname $host" >&2; exit 255; }}
exec nsenter --target "$pid" --mount --uts --net --pid -- env -i HOME={folder}/"$host" \\
    PATH=/usr/bin:/bin:/usr/sbin:/sbin {variables} bash -c "cd; $*"
"""


@dataclass
class World:
    """Two machines that share a file system, and nothing else but a wire."""

    folder: Path
    _init: subprocess.Popen | None = field(default=None, init=False)

    def start(self) -> None:
        """Make both machines; skips the test where that is not allowed."""
        for name in ADDRESSES:
            (self.folder / name).mkdir(exist_ok=True)
        Path("/tmp/ray").mkdir(exist_ok=True)
        tools = self.folder / "bin"
        tools.mkdir()
        (tools / "ssh").write_text(_fake_ssh(self.folder), encoding="utf-8")
        (tools / "ssh").chmod(0o755)
        network = BRIDGE.format(address=ADDRESSES[HEAD])
        script = MACHINE.format(name=HEAD, folder=self.folder, network=network)
        log = self.folder / "world.log"
        with log.open("wb") as stream:
            self._init = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *UNSHARE.split(), "bash", "-c", script],
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        while not (self.folder / f"{HEAD}.up").exists():
            if self._init.poll() is not None:
                pytest.skip(f"cannot make machines of namespaces here: {log.read_text(encoding='utf-8').strip()}")
            time.sleep(0.02)
        self.plug_in_worker()

    def plug_in_worker(self) -> None:
        """Make `node-b`, or make it anew after `kill_worker`."""
        network = f"until ip address add {ADDRESSES[WORKER]}/24 dev wire; do sleep 0.05; done; ip link set wire up"
        script = MACHINE.format(name=WORKER, folder=self.folder, network=network)
        (self.folder / f"{WORKER}.up").unlink(missing_ok=True)
        self.run(
            HEAD,
            f"setsid {UNSHARE} bash -c {shlex.quote(script)} >>{self.folder}/{WORKER}.log 2>&1 & "
            "until pid=$(</proc/$!/task/$!/children) && [[ $pid ]]; do sleep 0.05; done; pid=${pid// /}; "
            f"until ip link add port type veth peer name wire netns $pid; do sleep 0.05; done; "
            f"ip link set port master bridge up; echo $pid >{self.folder}/{WORKER}.pid; "
            f"until [[ -e {self.folder}/{WORKER}.up ]]; do sleep 0.05; done",
        )

    def kill_worker(self) -> None:
        """Power off `node-b`: every process of it dies, and its end of the wire is gone."""
        self.run(HEAD, f"kill -9 $(cat {self.folder}/{WORKER}.pid)")

    def popen(self, machine: str, command: str, log: Path, **variables: str) -> subprocess.Popen:
        """Start a command on a machine, as its user's shell would, appending what it prints to `log`."""
        path = f"{self.folder}/bin:{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin"
        entry = ["nsenter", "--target", str(self._init_pid()), "--mount", "--uts", "--net", "--pid", "--"]
        if machine == WORKER:
            pid = (self.folder / f"{WORKER}.pid").read_text(encoding="utf-8").strip()
            entry += ["nsenter", "--target", pid, "--mount", "--uts", "--net", "--pid", "--"]
        settings = {**ENVIRONMENT, "HOME": f"{self.folder}/{machine}", "PATH": path, **variables}
        environment = ["env", "-i", *(f"{name}={value}" for name, value in settings.items())]
        with log.open("ab") as stream:
            return subprocess.Popen(
                [*entry, *environment, "bash", "-c", f"cd {REPOSITORY}\n{command}"],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def run(self, machine: str, command: str, expect: int = 0, timeout_s: float = 300, **variables: str) -> str:
        """Run a command on a machine to its end; returns what it printed."""
        log = self.folder / f"command_{time.monotonic_ns()}.log"
        process = self.popen(machine, command, log, **variables)
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"{command}: not within {timeout_s} s\n{log.read_text(encoding='utf-8')}") from None
        assert status == expect, f"{command}: status {status}\n{log.read_text(encoding='utf-8')}"
        return log.read_text(encoding="utf-8")

    def trainers(self, machine: str) -> list[str]:
        """Worker processes of the trainer that a machine runs."""
        # The first machine's process namespace contains the second's.
        own = '[[ $(readlink $p/ns/pid) == "$(readlink /proc/self/ns/pid)" ]]'
        listing = self.run(
            machine, f"for p in /proc/[0-9]*; do {own} && tr '\\0' ' ' <$p/cmdline && echo; done 2>&1 || :"
        )
        return [line for line in listing.splitlines() if "ActorRolloutRefWorker" in line]

    def close(self) -> None:
        """End both machines with all that runs on them."""
        if self._init is not None:
            self._init.kill()
            self._init.wait()

    def _init_pid(self) -> int:
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text(encoding="utf-8")
        return int(children.split()[0])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Both machines with a Ray cluster on them, which the scripts have started."""
    if missing := [tool for tool in ("unshare", "nsenter", "setpriv", "ip") if not _installed(tool)]:
        pytest.skip(f"needs {', '.join(missing)} to make machines of namespaces")
    world = World(tmp_path_factory.mktemp("world"))
    with contextlib.closing(world):
        world.start()
        started = world.run(HEAD, f"bash verl/examples/ray/run_worker_n.sh {ADDRESSES[WORKER]}")
        assert "2 nodes are up; next: NNODES=2 bash scripts/run_multi_node.sh" in started
        yield world


def _fake_ssh(folder: Path) -> str:
    variables = shlex.join(f"{name}={value}" for name, value in ENVIRONMENT.items())
    return FAKE_SSH.format(folder=folder, worker=WORKER, worker_address=ADDRESSES[WORKER], variables=variables)


def _installed(tool: str) -> bool:
    return subprocess.run(["bash", "-c", f"type -P {tool}"], capture_output=True).returncode == 0


PLACEMENT = """
import json, os, socket, sys
import ray, torch
from functools import partial

from verl.single_controller import RayResourcePool, RayWorkerGroup, Worker, each
from verl.trainer.ppo.cluster import worker_env

class Adder(Worker):
    def add(self, names):
        torch.distributed.init_process_group("gloo")
        total = torch.tensor([float(self.rank)])
        torch.distributed.all_reduce(total)
        return float(total), {name: os.environ.get(name) for name in names}

class Adders(RayWorkerGroup):
    add = each(Adder.add)

ray.init(address="auto", log_to_driver=False)
pool = RayResourcePool([1, 1], use_gpu=False)
group = Adders(pool, partial(Adder), worker_env=worker_env(on_gpu=False))
places = [(info.rank, info.node, info.address, info.node_id) for info in group.processes.infos]
print("RESULT", json.dumps([places, group.add(sys.argv[1:])]))
group.shutdown()
"""


def test_one_process_a_node_lies_on_two_nodes_and_reaches_the_other(world):
    script = world.folder / "placement.py"
    script.write_text(PLACEMENT, encoding="utf-8")
    variables = {"NCCL_DEBUG": "WARN", "WANDB_MODE": "offline", "WANDB_API_KEY": "secret"}
    output = world.run(HEAD, f"python {script} GLOO_SOCKET_IFNAME {' '.join(variables)}", **variables)
    places, results = json.loads(output.partition("RESULT ")[2].splitlines()[0])
    assert [place[:3] for place in places] == [[0, HEAD, ADDRESSES[HEAD]], [1, WORKER, ADDRESSES[WORKER]]]
    assert places[0][3] != places[1][3]
    assert [total for total, _ in results] == [1.0, 1.0]
    assert [seen["GLOO_SOCKET_IFNAME"] for _, seen in results] == ["bridge", "wire"]
    for _, seen in results:
        assert (seen["NCCL_DEBUG"], seen["WANDB_MODE"], seen["WANDB_API_KEY"]) == ("WARN", "offline", None)


@dataclass
class Run:
    """`scripts/run_multi_node.sh` on the head, saving into a folder."""

    world: World
    folder: Path
    overrides: list[str]

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def start(self, **variables: str) -> subprocess.Popen:
        """Start the trainer, or go on with it."""
        overrides = shlex.join([*self.overrides, f"trainer.default_local_dir={self.folder}"])
        command = f"bash scripts/run_multi_node.sh {overrides}"
        return self.world.popen(HEAD, command, self.log, **{"NNODES": "2", **variables})

    def finish(self) -> Run:
        """Start, and wait for a good end."""
        assert self.start().wait(500) == 0, self.log.read_text(encoding="utf-8")[-5000:]
        return self

    def refused(self, **variables: str) -> str:
        """Start, and return the one line with which it ends."""
        self.log.write_text("", encoding="utf-8")
        assert self.start(**variables).wait(120) == 2, self.log.read_text(encoding="utf-8")[-5000:]
        errors = [line for line in self.log.read_text(encoding="utf-8").splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in self.log.read_text(encoding="utf-8"), self.log.read_text(
            encoding="utf-8"
        )[-5000:]
        return errors[0]

    def steps(self) -> dict[int, dict[str, float]]:
        """What was logged that does not depend on the clock, by step."""
        path = self.folder / METRICS_FILE
        rows = map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.exists() else [])
        return {row.pop("step"): lasting(row) for row in rows}


@pytest.fixture(scope="module")
def overrides(small_run: list[str], tiny_model_dir: Path) -> list[str]:
    """One process a node, 20 steps of about a second, a checkpoint after every other one."""
    return [
        *small_run,
        "trainer.n_gpus_per_node=1",
        f"actor_rollout_ref.model.path={os.path.relpath(tiny_model_dir, REPOSITORY)}",
        "actor_rollout_ref.actor.ulysses_sequence_parallel_size=1",
        "actor_rollout_ref.ref.fsdp_config.param_offload=false",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "actor_rollout_ref.rollout.max_num_batched_tokens=8192",
        "trainer.total_training_steps=20",
        "trainer.val_before_train=false",
        "trainer.save_freq=2",
        "trainer.test_freq=20",
    ]


@pytest.fixture(scope="module")
def uninterrupted(world: World, overrides: list[str]) -> Run:
    """The run that all others are compared with."""
    return Run(world, world.folder / "uninterrupted", overrides).finish()


def test_two_nodes_train(uninterrupted):
    assert sorted(uninterrupted.steps()) == [*range(1, 21)]


def _kill_worker_process(world: World) -> None:
    world.run(WORKER, "kill -9 $(grep -l [A]ctorRolloutRefWorker /proc/[0-9]*/cmdline | cut -d/ -f3)")


def _power_off(world: World) -> None:
    world.kill_worker()


def _unplug(world: World) -> None:
    world.run(HEAD, "ip link set port down")


def _repair_nothing(world: World) -> None:
    assert len(_alive(world)) == 2


def _power_on(world: World) -> None:
    world.plug_in_worker()
    _join(world)


def _plug_in(world: World) -> None:
    world.run(HEAD, "ip link set port up")
    # The machine hears that it was given up, and ends what it still runs.
    _wait(lambda: not world.trainers(WORKER), 60, "the trainer on the node that was cut off still runs")
    _join(world)


def _join(world: World) -> None:
    token = (world.folder / HEAD / ".ray" / "auth_token").read_text(encoding="utf-8")
    world.run(WORKER, f"bash verl/examples/ray/run_worker.sh {ADDRESSES[HEAD]}", RAY_AUTH_TOKEN=token)
    _wait(lambda: len(_alive(world)) == 2, 60, "the node does not join again")


def _alive(world: World) -> list[str]:
    listing = world.run(HEAD, "python -c 'import ray; ray.init(\"auto\"); print(ray.nodes())' 2>&1")
    return [address for address in ADDRESSES.values() if _is_alive(listing, address)]


def _is_alive(listing: str, address: str) -> bool:
    records = listing.split("{'NodeID'")
    return any("'Alive': True" in record and f"'NodeManagerAddress': '{address}'" in record for record in records)


def _wait(condition: Callable[[], bool], timeout_s: float, complaint: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.1)


LOSSES = [(3, _kill_worker_process, _repair_nothing), (9, _power_off, _power_on), (15, _unplug, _plug_in)]


def test_a_loss_ends_the_run_within_a_minute_and_the_next_start_goes_on(world, uninterrupted, overrides):
    run = Run(world, world.folder / "interrupted", overrides)
    for step, lose, repair in LOSSES:
        run.log.write_text("", encoding="utf-8")
        _end_by_loss(run, step, lose)
        repair(world)
    assert run.finish().steps() == uninterrupted.steps()
    assert "going on from" in run.log.read_text(encoding="utf-8")


def _end_by_loss(run: Run, step: int, lose: Callable[[World], None]) -> None:
    """Start, lose the worker once `step` is done, and check how that ends."""
    process = run.start()
    done = f"] step {step}\n"
    _wait(lambda: done in run.log.read_text(encoding="utf-8") or process.poll() is not None, 400, f"no step {step}")
    assert process.poll() is None, run.log.read_text(encoding="utf-8")[-5000:]
    lose(run.world)
    start = time.monotonic()
    status = process.wait(120)
    seconds, output = time.monotonic() - start, run.log.read_text(encoding="utf-8")
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert status == 1 and seconds < 60 and len(errors) == 1, f"{status} after {seconds:.0f} s\n{output[-5000:]}"
    assert "worker rank 1 of actor_rollout" in errors[0] and f"on node {WORKER}, {ADDRESSES[WORKER]}" in errors[0]
    assert "Traceback" not in output
    _wait(lambda: not run.world.trainers(HEAD), 60, "the other node's worker lives on")


def test_what_the_cluster_lacks_is_one_line_within_seconds(world, overrides):
    run = Run(world, world.folder / "refused", overrides)
    line = run.refused(NNODES="4")
    assert "no room for [1, 1, 1, 1] processes" in line
    assert "it has 2 nodes: 10.77.0.1 (" in line and "10.77.0.2 (" in line
    for address in ("10.77.0.1:6380", "10.77.0.99:6379", "nowhere:6379", "10.77.0.1"):
        assert f"RAY_ADDRESS={address}: no Ray cluster answers" in run.refused(RAY_ADDRESS=address)


def test_a_folder_that_only_one_node_sees_is_refused(world, overrides):
    run = Run(world, world.folder / "local", overrides)
    run.folder.mkdir()
    world.run(WORKER, f"mount -t tmpfs tmpfs {run.folder}")
    assert f"trainer.default_local_dir={run.folder}: {ADDRESSES[WORKER]} cannot see" in run.refused()
    assert not list(run.folder.iterdir())


def _kill_on_head(world: World, names: str) -> None:
    own = '[[ $(readlink /proc/$p/ns/pid) == "$(readlink /proc/self/ns/pid)" ]]'
    world.run(HEAD, f"for p in $(pidof {names}); do ! {own} || kill -9 $p; done")


@pytest.mark.parametrize("lost", ["gcs_server", "gcs_server raylet"])
def test_a_lost_head_ends_the_run_and_a_new_cluster_goes_on(world, overrides, lost):
    """The last test here: it takes the cluster with it."""
    run = Run(world, world.folder / f"lost_{lost.count(' ')}", [*overrides, "trainer.total_training_steps=1000"])
    process = run.start()
    _wait(lambda: "] step 3\n" in run.log.read_text(encoding="utf-8") or process.poll() is not None, 400, "no step 3")
    assert process.poll() is None, run.log.read_text(encoding="utf-8")[-5000:]
    _kill_on_head(world, lost)
    status, output = process.wait(180), run.log.read_text(encoding="utf-8")
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert status == 1 and len(errors) == 1 and "Traceback" not in output, f"{status}\n{output[-9000:]}"
    assert f"the Ray head at {ADDRESSES[HEAD]}:6379 does not answer either: start the cluster anew" in errors[0]
    for machine in (WORKER, HEAD):
        world.run(machine, "ray stop --force")
    world.run(HEAD, f"bash verl/examples/ray/run_worker_n.sh {ADDRESSES[WORKER]}")
    last = int((run.folder / LATEST_FILE).read_text(encoding="utf-8"))
    assert f"the same command goes on from {run.folder}/global_step_{last}" in errors[0]
    run.overrides[-1] = f"trainer.total_training_steps={last + 2}"
    assert sorted(run.finish().steps()) == [*range(1, last + 3)]
