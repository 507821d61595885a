"""The trainer: Ray single controller, FSDP2 actors, rollout engines of `xbai`."""

from verl.protocol import DataProto

__all__ = ["DataProto"]
