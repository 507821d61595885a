"""Which methods of a worker the driver can call, and how their arguments and results are dealt out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from verl.protocol import DataProto, pad_dataproto_to_divisor, unpad_dataproto

F = TypeVar("F", bound=Callable)

REGISTRATION_ATTRIBUTE = "_registration"


class Dispatch(Enum):
    """How one call on the driver becomes calls on the ranks, and their results one result.

    ONE_TO_ALL: every rank gets the same arguments; the list of all results, rank 0's first.
    DP_COMPUTE_PROTO: every `DataProto` argument is cut into one chunk per rank, padded with copies of its first rows
        where it does not divide; the results are stacked and the rows that come of the padding dropped (a method may
        return k rows for each row). For methods that treat rows independently.
    DP_COMPUTE_METRIC: the same without padding, for methods where an extra row would count; rows must divide.
    Arguments that are not a `DataProto` go to every rank unchanged. Where ranks work in groups (see `register`), a
    chunk goes to all ranks of one group, and the result is taken from the first of them.
    """

    ONE_TO_ALL = "one_to_all"
    DP_COMPUTE_PROTO = "dp_compute_proto"
    DP_COMPUTE_METRIC = "dp_compute_metric"


@dataclass(frozen=True)
class Registration:
    """What `register` was told about a method."""

    dispatch_mode: Dispatch
    group: str | None = None


@dataclass(frozen=True)
class RankCalls:
    """The arguments of each called rank or group of ranks, and how to make one result of theirs.

    Attributes:
        arguments: positional and named, one entry for each group of `group_size` consecutive ranks.
        collect: from the results of the first rank of each group to the result of the call.
        group_size: ranks that get the same arguments.
    """

    arguments: list[tuple[tuple, dict[str, Any]]]
    collect: Callable[[list[Any]], Any]
    group_size: int = 1


def register(dispatch_mode: Dispatch = Dispatch.ONE_TO_ALL, group: str | None = None) -> Callable[[F], F]:
    """Let a worker's method be declared as one of its worker group (see `each` and `joined`).

    Args:
        dispatch_mode: how arguments and results are dealt out.
        group: for the `DP_` modes, the kind of groups in which consecutive ranks share the rows (sequence or tensor
            parallel ranks); `RayWorkerGroup(group_sizes=...)` says how many ranks that is, 1 by default.
    """

    def decorate(method: F) -> F:
        setattr(method, REGISTRATION_ATTRIBUTE, Registration(dispatch_mode, group))
        return method

    return decorate


def registration_of(method: Callable) -> Registration:
    """What `register` was told about a method.

    Raises:
        TypeError: nothing.
    """
    registration = getattr(method, REGISTRATION_ATTRIBUTE, None)
    if registration is None:
        raise TypeError(f"{method.__qualname__} is not registered")
    return registration


def dispatch(mode: Dispatch, world_size: int, args: tuple, kwargs: dict[str, Any], group_size: int = 1) -> RankCalls:
    """Deal the arguments of one call out to the ranks, or (`DP_` modes) to the groups of `group_size` ranks.

    Raises:
        ValueError: an argument that does not fit `mode`.
    """
    if mode is Dispatch.ONE_TO_ALL:
        return RankCalls([(args, kwargs)] * world_size, list)
    pad = mode is Dispatch.DP_COMPUTE_PROTO
    return RankCalls(*_deal_rows(world_size // group_size, args, kwargs, pad), group_size)


def _deal_rows(
    groups: int, args: tuple, kwargs: dict[str, Any], pad: bool
) -> tuple[list[tuple[tuple, dict[str, Any]]], Callable[[list[Any]], Any]]:
    lengths = {len(value) for value in (*args, *kwargs.values()) if isinstance(value, DataProto)}
    if len(lengths) != 1:
        raise ValueError(f"expected batches of one length, got lengths {sorted(lengths)}")
    rows = lengths.pop()
    padding = -rows % groups if pad else 0

    def cut(value: Any) -> list[Any]:
        if not isinstance(value, DataProto):
            return [value] * groups
        return (pad_dataproto_to_divisor(value, groups)[0] if pad else value).chunk(groups)

    def collect(results: list[Any]) -> Any:
        if not isinstance(results[0], DataProto):
            return results
        stacked = DataProto.concat(results)
        return unpad_dataproto(stacked, padding * (len(stacked) // (rows + padding)))

    columns, named = [cut(value) for value in args], {key: cut(value) for key, value in kwargs.items()}
    calls = [
        (tuple(column[group] for column in columns), {key: value[group] for key, value in named.items()})
        for group in range(groups)
    ]
    return calls, collect
