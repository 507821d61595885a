"""What one rank does for all, and what all do for one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from xbai.errors import UserError
from xbai.files import why_not_written

Result = TypeVar("Result")


def on_first_rank(work: Callable[[], Result]) -> Result:
    """What `work` returns on rank 0, on every rank; the same `UserError` on all where it raised one, or could not read
    or write something. A collective."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except (OSError, UserError) as error:
            outcome[1] = why_not_written(error)
    dist.broadcast_object_list(outcome)
    result, failure = outcome
    if failure is not None:
        raise UserError(failure)
    return result


def check_on_all_ranks(check: Callable[[], None]) -> None:
    """Run a check of what this rank has, on every rank; raises on all the `UserError` of the first one whose check did.
    A collective."""
    mistake = None
    try:
        check()
    except UserError as error:
        mistake = str(error)
    mistakes: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(mistakes, mistake)
    if first := next(filter(None, mistakes), None):
        raise UserError(first)
