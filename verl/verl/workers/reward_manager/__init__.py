"""From responses to rewards, graded in killable processes."""

from verl.workers.reward_manager.manager import (
    REWARD_MANAGERS,
    DAPORewardManager,
    NaiveRewardManager,
    PendingReward,
    PrimeRewardManager,
    Reward,
)

__all__ = [
    "REWARD_MANAGERS",
    "DAPORewardManager",
    "NaiveRewardManager",
    "PendingReward",
    "PrimeRewardManager",
    "Reward",
]
