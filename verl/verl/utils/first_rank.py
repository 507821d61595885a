"""What one rank does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from xbai.errors import UserError
from xbai.files import why_not_written

Result = TypeVar("Result")


def on_first_rank(work: Callable[[], Result]) -> Result:
    """What `work` returns on rank 0, on every rank. A collective.

    Raises:
        UserError: on every rank the same, where `work` raised one, or could not read or write something.
    """
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
