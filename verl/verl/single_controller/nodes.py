"""The machines of a Ray cluster: how they are told apart, where they listen, and whether they still do."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from xbai.errors import UserError, one_line

ANSWER_TIMEOUT_S = 5.0
START_TIMEOUT_S = 300.0
"""For the first Python process on a node, whose imports may come over the network."""


@dataclass(frozen=True)
class Node:
    """One machine's part of a placement.

    Attributes:
        id: Ray's name for it.
        address: the IP address by which the other nodes reach it.
        interface: the network interface that has this address; None where it is not an IPv4 one.
        cpu_count: its CPU cores.
        strategies: one for each rank that runs there: places it, and what is to run beside it.
    """

    id: str
    address: str
    interface: str | None
    cpu_count: int
    strategies: tuple[PlacementGroupSchedulingStrategy, ...]

    @property
    def is_here(self) -> bool:
        """Whether this process runs on it, so that what is to be known of it needs no other process."""
        return self.id == _this_node()

    @property
    def gloo_interface(self) -> dict[str, str]:
        """The variable that has gloo listen where the other nodes reach this one; alone it asks the host's name."""
        return {"GLOO_SOCKET_IFNAME": self.interface} if self.interface else {}


def nodes_of_bundles(group: PlacementGroup) -> list[tuple[int, str]]:
    """Index and node id of each bundle of a placed group: the driver's own node first, then by address."""
    here, address_of = _this_node(), _addresses()
    places = ray.util.placement_group_table(group)["bundles_to_node_id"].items()
    return sorted(places, key=lambda place: (place[1] != here, _address_order(address_of[place[1]]), place[0]))


def look_up_nodes(group: PlacementGroup, node_of_rank: list[str]) -> list[Node]:
    """The nodes of a placed group with one bundle a rank, the ranks of one node next to each other.

    Args:
        group: a ready placement group.
        node_of_rank: the node id of each bundle.
    """
    strategies: dict[str, list[PlacementGroupSchedulingStrategy]] = {}
    for rank, node_id in enumerate(node_of_rank):
        strategies.setdefault(node_id, []).append(PlacementGroupSchedulingStrategy(group, rank))
    here, address_of = _this_node(), _addresses()
    look_around_there = ray.remote(num_cpus=0)(_look_around)
    asked = {
        address_of[node_id]: look_around_there.options(scheduling_strategy=own[0]).remote(address_of[node_id])
        for node_id, own in strategies.items()
        if node_id != here
    }
    seen: dict[str, tuple[str | None, int]] = dict(zip(asked, answers_by_node(asked), strict=True))
    if here in strategies:
        seen[address_of[here]] = _look_around(address_of[here])
    return [
        Node(node_id, address_of[node_id], *seen[address_of[node_id]], tuple(own))
        for node_id, own in strategies.items()
    ]


def answers_by_node(asked: Mapping[str, ray.ObjectRef]) -> list[Any]:
    """The results of one task a node, in the order of `asked`, whose keys are the nodes' addresses.

    Raises:
        UserError: a node starts no process, or went away.
    """
    _, silent = ray.wait(list(asked.values()), num_returns=len(asked), timeout=START_TIMEOUT_S)
    results = []
    for address, ref in asked.items():
        if ref in silent:
            raise UserError(f"node {address} has started no process within {START_TIMEOUT_S:g} s; see Ray's logs there")
        try:
            results.append(ray.get(ref))
        except RayError as error:
            raise UserError(f"node {address} cannot be used: {one_line(error)}") from error
    return results


def answers(node_id: str) -> bool:
    """Whether a node's Ray process takes connections: known at once, where Ray's own verdict may take half a minute."""
    node = next((node for node in ray.nodes() if node["NodeID"] == node_id), None)
    if node is None or not node["Alive"]:
        return False
    try:
        where = (node["NodeManagerAddress"], node["NodeManagerPort"])
        socket.create_connection(where, timeout=ANSWER_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def alive_nodes() -> list[dict[str, Any]]:
    """Ray's records of the nodes that run, by address."""
    return sorted(
        (node for node in ray.nodes() if node["Alive"]), key=lambda node: _address_order(node["NodeManagerAddress"])
    )


def _this_node() -> str:
    return ray.get_runtime_context().get_node_id()


def _addresses() -> dict[str, str]:
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}


def _address_order(address: str) -> tuple[int, bytes]:
    """Numeric order, so that 10.0.0.9 comes before 10.0.0.10."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return family, socket.inet_pton(family, address)


def _look_around(address: str) -> tuple[str | None, int]:
    """The interface and the number of cores of the node on which this runs; a node's own setting comes first."""
    return os.environ.get("GLOO_SOCKET_IFNAME") or _interface_of(address), os.cpu_count() or 1


def _interface_of(address: str) -> str | None:
    """The network interface of this machine that has an IPv4 address."""
    of_interface = psutil.net_if_addrs().items()
    own = ((name, one) for name, addresses in of_interface for one in addresses if one.family is socket.AF_INET)
    return next((name for name, one in own if one.address == address), None)
