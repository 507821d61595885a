"""Beam search over reasoning steps (arXiv 2408.03314, section 5.2)."""

from __future__ import annotations

from xbai.search.expander import Expander
from xbai.search.path import ROOT, SearchPath, Value, highest


async def beam_search(expander: Expander, width: int, expand: int, value: Value) -> list[SearchPath]:
    """Sample `expand` next steps of each of `width` paths, keep the `width` best of all; until all have ended.

    Finished paths hold their place for as long as they are among the best.

    Returns:
        The finished paths, best first.
    """
    beam = [ROOT] * width
    while any(path.open for path in beam):
        finished = [path for path in beam if not path.open]
        children = await expander.extend([path for path in beam if path.open for _ in range(expand)])
        beam = highest([*finished, *children], width, value)
    return beam
