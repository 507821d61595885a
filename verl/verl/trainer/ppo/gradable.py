"""Whether a run's data can be graded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from verl.trainer.config.reward import CustomRewardFunction
from xbai.errors import UserError
from xbai.grading import CustomGrader, GradeRequest
from xbai.grading.dispatch import answer_check


def check_gradable(rows: Iterable[tuple[str, str, Any]], custom: CustomRewardFunction) -> None:
    """Make sure that every row can be graded, before anything is generated.

    Args:
        rows: for each where it is, its data source and its `reward_model`.
        custom: where to look for a function of one's own.

    Raises:
        UserError: a data source without a grader, a row without an answer to grade by (a custom reward function may do
            without), or a custom reward function that is not there.
    """
    if custom.path is not None:
        CustomGrader(custom.path, custom.name).load()
    for place, source, reward_model in rows:
        if not isinstance(reward_model, dict):
            raise UserError(f"{place}: 'reward_model' must be {{style, ground_truth}}, found {reward_model!r:.60}")
        if custom.path is None:
            answer_check(source)
            _check_ground_truth(source, reward_model, place)


def _check_ground_truth(source: str, reward_model: dict[str, Any], place: str) -> None:
    try:
        GradeRequest(source, "", reward_model.get("ground_truth")).target  # noqa: B018
    except ValueError as error:
        raise UserError(
            f"{place}: 'reward_model' has no ground_truth (text, number or {{target: ...}}), found {reward_model!r:.60}"
        ) from error
