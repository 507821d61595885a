"""Sampling responses with the policy being trained."""

from verl.workers.rollout.engine_rollout import EngineRollout

__all__ = ["EngineRollout"]
