"""What grades the responses: the sections `reward_model` and `custom_reward_function`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from verl.trainer.config.fields import (
    ActsWith,
    Coefficient,
    Field,
    Flag,
    Positive,
    PositiveNumber,
    Section,
    Text,
    Whole,
)


def _of_managers(*names: str) -> ActsWith:
    only = f"only with {', '.join(names)}; leave it at its default"
    return ActsWith("reward_model.reward_manager", names, f"cannot act with reward_model.reward_manager={{}}, {only}")


@dataclass(frozen=True, kw_only=True)
class OverlongBuffer(Section):
    """DAPO's penalty of responses that come close to the limit."""

    len: Annotated[Whole, Field(ge=0)]
    penalty_factor: Coefficient


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(Section):
    """The processes that grade."""

    reward_manager: Literal["naive", "prime", "dapo", "batch"]
    launch_reward_fn_async: Flag
    num_workers: Annotated[Positive | None, _of_managers("prime", "dapo")]
    timeout_s: Annotated[Positive, _of_managers("naive", "prime", "dapo")]
    batch_timeout_s: Annotated[Positive, _of_managers("batch")]
    memory_gib: PositiveNumber
    max_ungraded_batches: Positive | None
    overlong_buffer: Annotated[OverlongBuffer, _of_managers("dapo")]

    def mistakes(self, longest_response: int, custom: CustomRewardFunction) -> Iterator[str]:
        """A line for each."""
        if self.reward_manager == "batch" and custom.path is None:
            yield (
                "reward_model.reward_manager=batch needs custom_reward_function.path, a Python file whose function "
                "takes the lists data_sources, solution_strs, ground_truths and extra_infos"
            )
        if self.reward_manager == "dapo" and not 0 < self.overlong_buffer.len <= longest_response:
            yield (
                f"reward_model.overlong_buffer.len={self.overlong_buffer.len}: reward_manager=dapo needs it between 1 "
                f"and data.max_response_length={longest_response}"
            )


@dataclass(frozen=True, kw_only=True)
class CustomRewardFunction(Section):
    """A grader of one's own."""

    path: Text | None
    name: Text
