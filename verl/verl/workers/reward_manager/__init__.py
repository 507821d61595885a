"""From responses to rewards, graded in killable processes."""

from verl.workers.reward_manager.manager import (
    REWARD_MANAGERS,
    BatchRewardManager,
    DAPORewardManager,
    NaiveRewardManager,
    PrimeRewardManager,
)
from verl.workers.reward_manager.reward import PendingReward, Reward

__all__ = [
    "REWARD_MANAGERS",
    "BatchRewardManager",
    "DAPORewardManager",
    "NaiveRewardManager",
    "PendingReward",
    "PrimeRewardManager",
    "Reward",
]
