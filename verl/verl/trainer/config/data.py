"""The `data` section of the RL trainer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from verl.trainer.config.fields import Field, Files, Flag, Positive, Section, Text, Whole


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The prompts, and how long they and their responses may be."""

    train_files: Files
    val_files: Files | None
    prompt_key: Text
    reward_fn_key: Text
    train_batch_size: Positive
    val_batch_size: Positive | None
    max_prompt_length: Positive
    max_response_length: Positive
    filter_overlong_prompts: Flag
    truncation: Literal["error", "left", "right"]
    return_raw_chat: Flag
    shuffle: Flag
    dataloader_num_workers: Annotated[Whole, Field(ge=0, description="must not be below 0")]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with the longest response."""
        return self.max_prompt_length + self.max_response_length

    def no_room(self, key: str, bound: int | None) -> Iterator[str]:
        """What is wrong where `bound` tokens of `key` are less than the longest row."""
        if bound is not None and bound < self.longest:
            yield (f"{key}={bound} is less than data.max_prompt_length + data.max_response_length = {self.longest}")

    def mistakes(self) -> Iterator[str]:
        """A line for each."""
        if not self.train_files:
            yield f"data.train_files={self.train_files} names no file"
