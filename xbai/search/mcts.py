"""Monte Carlo tree search over reasoning steps, with the step score in the place of random play-outs.

The score head values every new node, as it does in arXiv 2507.01951, so that a simulation costs one step and not a
whole response. Nodes are chosen by PUCT, whose prior is how often the policy itself sampled the step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from xbai.search.expander import Expander
from xbai.search.path import ROOT, SearchPath, Value, highest


@dataclass(eq=False)
class Node:
    """A path in the tree.

    Attributes:
        prior: share of its parent's samples that took this step.
        visits, total: how many nodes from here on were valued, and the sum of their values.
        closed: nothing is left to expand from here on (or it is being expanded).
    """

    path: SearchPath
    parent: Node | None = None
    prior: float = 1.0
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0
    closed: bool = False

    def lineage(self) -> Iterator[Node]:
        """The node and its ancestors."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def upper_bound(self, exploration: float, parent_visits: int) -> float:
        """PUCT: mean value, and a bonus that is large for likely steps with few visits."""
        bonus = exploration * self.prior * math.sqrt(parent_visits) / (1 + self.visits)
        return self.total / self.visits + bonus


async def tree_search(expander: Expander, width: int, expand: int, value: Value, exploration: float) -> Node:
    """Choose up to `width` leaves, sample `expand` next steps of each, value them; until the budget is spent.

    Returns:
        The root; see `finished_paths`.
    """
    root = Node(ROOT)
    while leaves := _select(root, width, exploration):
        children = await expander.extend([leaf.path for leaf in leaves for _ in range(expand)])
        for number, leaf in enumerate(leaves):
            _grow(leaf, children[number * expand : (number + 1) * expand], value)
    return root


def finished_paths(root: Node, value: Value) -> list[SearchPath]:
    """The ended paths of a tree, best first; only cut-off ones where the budget ended before any response did."""
    ends, nodes = [], [root]
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if not node.path.open:
            ends.append(node.path)
    return highest(ends, len(ends), value)


def _select(root: Node, width: int, exploration: float) -> list[Node]:
    leaves: list[Node] = []
    while len(leaves) < width and not root.closed:
        node = root
        while node.children:
            bound = partial(Node.upper_bound, exploration=exploration, parent_visits=node.visits)
            node = max((child for child in node.children if not child.closed), key=bound)
        leaves.append(node)
        _close(node)
    return leaves


def _close(node: Node) -> None:
    for ancestor in node.lineage():
        ancestor.closed = all(child.closed for child in ancestor.children)


def _grow(leaf: Node, children: Sequence[SearchPath], value: Value) -> None:
    """Hang the distinct children under their leaf and pass their values up."""
    samples = Counter(path.text for path in children)
    for path in highest(children, len(children), value):
        worth = value(path) if path.finish_reason != "length" else 0.0
        child = Node(path, leaf, samples[path.text] / len(children), closed=not path.open)
        leaf.children.append(child)
        for node in child.lineage():
            node.visits += 1
            node.total += worth
    for node in leaf.lineage():
        node.closed = all(child.closed for child in node.children)
