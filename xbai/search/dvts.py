"""Diverse verifier tree search: greedy search in independent subtrees, whose paths never compete on the way."""

from __future__ import annotations

from xbai.search.expander import Expander, together
from xbai.search.path import ROOT, SearchPath, Value, highest


async def diverse_tree_search(expander: Expander, subtrees: int, expand: int, value: Value) -> list[SearchPath]:
    """Grow `subtrees` paths side by side, each on a budget of its own.

    Returns:
        The end of each subtree's path, best first.
    """
    ends = await together(greedy_search(part, expand, value) for part in expander.split(subtrees))
    return highest(ends, subtrees, value)


async def greedy_search(expander: Expander, expand: int, value: Value, start: SearchPath = ROOT) -> SearchPath:
    """Sample `expand` next steps, go on with the best; until the end."""
    path = start
    while path.open:
        (path,) = highest(await expander.extend([path] * expand), 1, value)
    return path
