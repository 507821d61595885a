"""The processes a run may use, node by node."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from verl.single_controller.nodes import Node, alive_nodes, look_up_nodes, nodes_of_bundles
from xbai.errors import UserError

logger = logging.getLogger(__name__)

PROMPT_S = 2.0
"""Room that is free is reserved sooner than this."""

NODE_ID_LABEL = "ray.io/node-id"
"""Ray gives every node this label."""


@dataclass
class RayResourcePool:
    """A part of each of several nodes, reserved as one; worker groups may share it.

    Attributes:
        process_on_nodes: number of processes on each node; no two entries are ever the same node.
        use_gpu: give each process one GPU.
        cpus_per_process: CPUs (or a fraction of one) reserved for each process.
        max_colocate_count: how many worker groups may share the pool's processes.
        processes_beside: of other pools on each node, that compute at the same time.
        timeout_s: how long to wait for room that others hold; what is waited for is logged at once.
    """

    process_on_nodes: Sequence[int]
    use_gpu: bool = True
    cpus_per_process: float = 1.0
    max_colocate_count: int = 1
    timeout_s: float = 60.0
    processes_beside: int = 0
    _group: PlacementGroup | None = field(default=None, init=False, repr=False)
    _nodes: list[Node] = field(default_factory=list, init=False, repr=False)

    @property
    def world_size(self) -> int:
        """Processes of the whole pool."""
        return sum(self.process_on_nodes)

    @property
    def worker_resources(self) -> dict[str, float]:
        """What one worker of one worker group takes of its node's part, as options of a Ray actor."""
        share = 1 / self.max_colocate_count
        return {"num_cpus": self.cpus_per_process * share, "num_gpus": share if self.use_gpu else 0}

    def nodes(self) -> list[Node]:
        """The pool's nodes in the order of the ranks, reserved on the first call.

        Ray has no strategy for "these bundles on one node, those on another". So it first finds different nodes with
        room for all that one of them gives, and then reserves one bundle a process, tied to the node that was found.
        (Ray could give two processes of one large bundle the same GPU, where worker groups share GPUs.)

        Raises:
            UserError: the cluster has no room: at once where its nodes are too few or too small, after `timeout_s`
                where others use them.
        """
        if not self._nodes:
            bundles = [self._bundle(count) for count in self.process_on_nodes]
            if not self._fits(bundles):
                raise UserError(self._no_room("it has"))
            found = self._reserve(bundles, "STRICT_SPREAD")
            places = nodes_of_bundles(found)
            remove_placement_group(found)
            node_of_rank = [node_id for index, node_id in places for _ in range(self.process_on_nodes[index])]
            tied = [{NODE_ID_LABEL: node_id} for node_id in node_of_rank]
            self._group = self._reserve([self._bundle(1)] * self.world_size, "PACK", tied)
            self._nodes = look_up_nodes(self._group, node_of_rank)
        return self._nodes

    def release(self) -> None:
        """Give the resources back to the cluster."""
        if self._group is not None:
            remove_placement_group(self._group)
        self._group, self._nodes = None, []

    def _reserve(
        self, bundles: list[dict[str, float]], strategy: str, labels: list[dict[str, str]] | None = None
    ) -> PlacementGroup:
        group = placement_group(bundles, strategy, bundle_label_selector=labels)
        if group.wait(min(PROMPT_S, self.timeout_s)):
            return group
        logger.warning("waiting for at most %g s: %s", self.timeout_s, self._no_room("others use some of"))
        if not group.wait(max(0.0, self.timeout_s - PROMPT_S)):
            remove_placement_group(group)
            raise UserError(self._no_room(f"after ray_init.timeout_s={self.timeout_s:g} others still use some of"))
        return group

    def _bundle(self, processes: int) -> dict[str, float]:
        gpus = {"GPU": processes} if self.use_gpu else {}
        return {"CPU": self.cpus_per_process * processes} | gpus

    @staticmethod
    def _fits(bundles: list[dict[str, float]]) -> bool:
        """Whether each bundle could have a node of its own, were nothing in use (bundles only differ in size)."""
        totals = [node["Resources"] for node in alive_nodes()]
        return all(
            sum(all(total.get(kind, 0) >= amount for kind, amount in bundle.items()) for total in totals)
            >= sum(other["CPU"] >= bundle["CPU"] for other in bundles)
            for bundle in bundles
        )

    def _no_room(self, verb: str) -> str:
        process, found, free = self._bundle(1), [], ray.available_resources()
        for node in alive_nodes():
            has = ", ".join(f"{node['Resources'].get(kind, 0):g} {kind}" for kind in process)
            found.append(f"{node['NodeManagerAddress']} ({has})")
        return (
            f"Ray has no room for {list(self.process_on_nodes)} processes on as many nodes (trainer.nnodes, "
            f"trainer.n_gpus_per_node), of {process} each; {verb} {len(found)} node{'s' if len(found) > 1 else ''}: "
            f"{', '.join(found)}; free are {', '.join(f'{free.get(kind, 0):g} {kind}' for kind in process)}"
        )
