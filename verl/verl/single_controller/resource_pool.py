"""The processes a run may use, node by node."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from xbai.errors import UserError


@dataclass
class RayResourcePool:
    """One placement group a node, each with one bundle a process; worker groups may share it.

    Attributes:
        process_on_nodes: number of processes on each node.
        use_gpu: give each process one GPU.
        cpus_per_process: CPUs (or a fraction of one) reserved for each process.
        max_colocate_count: how many worker groups may share the pool's processes.
        timeout_s: how long to wait for the cluster to have the room.
    """

    process_on_nodes: Sequence[int]
    use_gpu: bool = True
    cpus_per_process: float = 1.0
    max_colocate_count: int = 1
    timeout_s: float = 60.0
    _groups: list[PlacementGroup] = field(default_factory=list, init=False, repr=False)

    @property
    def world_size(self) -> int:
        """Processes of the whole pool."""
        return sum(self.process_on_nodes)

    @property
    def worker_resources(self) -> dict[str, float]:
        """What one worker of one worker group takes of its bundle, as options of a Ray actor."""
        share = 1 / self.max_colocate_count
        return {"num_cpus": self.cpus_per_process * share, "num_gpus": share if self.use_gpu else 0}

    def placement_groups(self) -> list[PlacementGroup]:
        """The pool's placement groups, made on the first call; every bundle of a group lies on one node.

        Raises:
            UserError: the cluster has no room for them.
        """
        if not self._groups:
            bundle = {"CPU": self.cpus_per_process} | ({"GPU": 1} if self.use_gpu else {})
            self._groups = [placement_group([bundle] * count, "STRICT_PACK") for count in self.process_on_nodes]
            deadline = time.monotonic() + self.timeout_s
            if not all(group.wait(max(0.0, deadline - time.monotonic())) for group in self._groups):
                self.release()
                raise UserError(self._no_room(bundle))
        return self._groups

    def release(self) -> None:
        """Give the resources back to the cluster."""
        for group in self._groups:
            remove_placement_group(group)
        self._groups = []

    def _no_room(self, bundle: dict[str, float]) -> str:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        found = [{kind: node.get(kind, 0) for kind in bundle} for node in nodes]
        return (
            f"Ray has no room for {list(self.process_on_nodes)} processes a node (trainer.nnodes, "
            f"trainer.n_gpus_per_node) of {bundle} each; its nodes have {found}, some perhaps in use"
        )
