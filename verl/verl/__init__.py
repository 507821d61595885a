"""The trainer: Ray single controller, FSDP2 actors, rollout engines of `xbai`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl.protocol import DataProto

__all__ = ["DataProto"]


def __getattr__(name: str) -> Any:
    """Import `DataProto` when it is first asked for: what trains a model does without it, and without tensordict."""
    if name == "DataProto":
        from verl.protocol import DataProto

        return DataProto
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
