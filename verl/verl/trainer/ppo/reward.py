"""The reward manager that a configuration asks for."""

from __future__ import annotations

from collections.abc import Iterable

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from verl.workers.reward_manager import REWARD_MANAGERS
from verl.workers.reward_manager.manager import RewardManager
from xbai.errors import UserError
from xbai.grading import CustomGrader
from xbai.grading.dispatch import answer_check


def load_reward_manager(config: DictConfig, tokenizer: PreTrainedTokenizerBase) -> RewardManager:
    """Build `reward_model.reward_manager`.

    Raises:
        UserError: unknown name.
    """
    name = config.reward_model.reward_manager
    if name not in REWARD_MANAGERS:
        raise UserError(f"reward_model.reward_manager={name} is unknown, use one of {', '.join(REWARD_MANAGERS)}")
    return REWARD_MANAGERS[name](tokenizer, config)


def check_gradable(data_sources: Iterable[str], config: DictConfig) -> None:
    """Make sure that there is a grader before anything is generated.

    Raises:
        UserError: a data source without a grader, or a custom reward function that is not there.
    """
    custom = config.custom_reward_function
    if custom.path is not None:
        CustomGrader(custom.path, custom.name).load()
        return
    for source in sorted(set(data_sources)):
        answer_check(source)
