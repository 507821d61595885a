"""Picking one answer among several candidates."""

from xbai.search.best_of_n import best_candidate
from xbai.search.majority import vote_key, vote_winners

__all__ = ["best_candidate", "vote_key", "vote_winners"]
