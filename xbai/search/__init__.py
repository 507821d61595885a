"""Picking one answer among several candidates, and searching for one step by step.

A search by steps sees only `Expander.extend`, which takes paths (`path.py`, a response on its way) one step further,
all at once and within the limits of the question. A `StepSource` is the one interface to a model. A quarter of a
token budget is kept to write the best response to its end where the rest of it finished none.
"""

from xbai.search.best_of_n import best_candidate
from xbai.search.majority import vote_winners, voted_candidate

__all__ = ["best_candidate", "vote_winners", "voted_candidate"]
