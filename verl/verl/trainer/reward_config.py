"""What a configuration asks of grading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from xbai.errors import UserError

ACTS_WITH: dict[str, tuple[str, ...]] = {
    "reward_model.num_workers": ("prime", "dapo"),
    "reward_model.timeout_s": ("naive", "prime", "dapo"),
    "reward_model.batch_timeout_s": ("batch",),
    "reward_model.overlong_buffer": ("dapo",),
}
"""Keys and sections that act with some reward managers only."""


def check_reward(config: DictConfig, changed: Mapping[str, Any]) -> None:
    """Raise a `UserError` for what cannot act.

    Args:
        config: composed.
        changed: values that are not the defaults, by key.
    """
    section = config.reward_model
    for key, value in changed.items():
        managers = next((ACTS_WITH[stem] for stem in ACTS_WITH if f"{key}.".startswith(f"{stem}.")), None)
        if managers is not None and section.reward_manager not in managers:
            raise UserError(
                f"{key}={value} cannot act with reward_model.reward_manager={section.reward_manager}, only with "
                f"{', '.join(managers)}; leave it at its default"
            )
    if section.reward_manager == "batch" and config.custom_reward_function.path is None:
        raise UserError(
            "reward_model.reward_manager=batch needs custom_reward_function.path, a Python file whose function takes "
            "the lists data_sources, solution_strs, ground_truths and extra_infos"
        )
    buffer, limit = section.overlong_buffer.len, config.data.max_response_length
    if section.reward_manager == "dapo" and not 0 < buffer <= limit:
        raise UserError(
            f"reward_model.overlong_buffer.len={buffer}: reward_manager=dapo needs it between 1 and "
            f"data.max_response_length={limit}"
        )
    if config.trainer.length_penalty and not 0 < (coeff := config.trainer.length_penalty_coeff) <= 2:
        raise UserError(
            f"trainer.length_penalty_coeff={coeff} must be above 0 and at most 2 with trainer.length_penalty=true: "
            "above 2 a long right answer would be worth less than a wrong one"
        )
