"""Picking one answer among several candidates, and searching for one step by step."""

from xbai.search.best_of_n import best_candidate
from xbai.search.majority import vote_winners, voted_candidate

__all__ = ["best_candidate", "vote_winners", "voted_candidate"]
