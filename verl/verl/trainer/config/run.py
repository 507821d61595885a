"""The sections `trainer` and `ray_init`: where a run happens, how long, and what it leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from verl.trainer.config.fields import (
    WITH_CRITIC,
    Field,
    Flag,
    Number,
    Positive,
    PositiveNumber,
    ResumeMode,
    Section,
    Text,
    Whole,
)


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(Section):
    """The run."""

    device: Literal["auto", "cuda", "cpu"]
    nnodes: Positive
    n_gpus_per_node: Positive
    device_tflops: PositiveNumber | None
    seed: Whole
    total_epochs: Positive
    total_training_steps: Positive | None
    project_name: Text
    experiment_name: Text
    logger: list[Text]
    save_freq: Whole
    test_freq: Whole
    val_before_train: Flag
    resume_mode: ResumeMode
    resume_from_path: Text | None
    resume_with_new_data: Flag
    default_local_dir: Text
    default_hdfs_dir: Text | None
    max_actor_ckpt_to_keep: Positive | None
    async_save: Flag
    critic_warmup: Annotated[Whole, Field(ge=0), WITH_CRITIC]
    balance_batch: Flag
    rollout_data_dir: Text | None
    length_penalty: Flag
    length_penalty_coeff: Number

    @property
    def processes(self) -> int:
        """Of the whole job."""
        return self.nnodes * self.n_gpus_per_node

    def mistakes(self) -> Iterator[str]:
        """A line for each."""
        if self.length_penalty and not 0 < self.length_penalty_coeff <= 2:
            yield (
                f"trainer.length_penalty_coeff={self.length_penalty_coeff} must be above 0 and at most 2 with "
                "trainer.length_penalty=true: above 2 a long right answer would be worth less than a wrong one"
            )


@dataclass(frozen=True, kw_only=True)
class RayInit(Section):
    """How Ray starts."""

    num_cpus: Positive | None
    timeout_s: Positive
