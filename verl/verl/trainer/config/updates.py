"""What policy, reference and critic have in common: rows that processes share, and the batches of updates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from verl.models.ulysses import check_head_counts
from verl.trainer.config.data import DataConfig
from verl.trainer.config.fields import Flag, Positive, PositiveNumber, Section, Whole, told


@dataclass(frozen=True)
class Job:
    """What batches are cut for.

    Attributes:
        data: its `train_batch_size` and longest row.
        processes: of the whole job.
        responses: to one prompt.
    """

    data: DataConfig
    processes: int
    responses: int


@dataclass(frozen=True, kw_only=True)
class SharedRows(Section):
    """Processes that share the tokens of the same rows."""

    ulysses_sequence_parallel_size: Positive

    def sharing_mistakes(self, job: Job, packed: bool, shape: Mapping[str, Any]) -> Iterator[str]:
        """A line for each, with `{section}` and `{root}` in place of the section's name and what `model` is under.

        Args:
            job: whose processes share rows.
            packed: `use_remove_padding` of the model.
            shape: the model's config.json, as far as it is known.
        """
        size = self.ulysses_sequence_parallel_size
        if size == 1:
            return
        key = f"{{section}}.ulysses_sequence_parallel_size={size}"
        if job.processes % size:
            yield f"{key} must divide the {job.processes} processes (trainer.nnodes * n_gpus_per_node)"
        elif not packed:
            yield f"{key} needs packed sequences: set {{root}}.model.use_remove_padding=true"
        elif (heads := shape.get("num_attention_heads")) is not None:
            found = told(check_head_counts, heads, shape.get("num_key_value_heads") or heads, size)
            yield from (f"{{section}}: {line}" for line in found)

    def budget_mistakes(self, data: DataConfig, key: str, tokens: int) -> Iterator[str]:
        """What is wrong where the `tokens` of `key` of each process that shares a row have no room for the longest."""
        size = self.ulysses_sequence_parallel_size
        return data.no_room(f"{key}{' * ulysses_sequence_parallel_size' if size > 1 else ''}", tokens * size)


@dataclass(frozen=True, kw_only=True)
class UpdateConfig(SharedRows):
    """The updates of a model that is trained."""

    ppo_mini_batch_size: Positive
    ppo_micro_batch_size_per_gpu: Positive
    use_dynamic_bsz: Flag
    ppo_max_token_len_per_gpu: Whole
    ppo_epochs: Positive
    shuffle: Flag
    grad_clip: PositiveNumber
    max_nonfinite_updates: Positive

    def batch_mistakes(self, job: Job, packed: bool, shape: Mapping[str, Any]) -> Iterator[str]:
        """As `sharing_mistakes`, and sizes that do not divide or have no room."""
        sharing = list(self.sharing_mistakes(job, packed, shape))
        yield from sharing
        train, mini = job.data.train_batch_size, self.ppo_mini_batch_size
        key = f"{{section}}.ppo_mini_batch_size={mini}"
        if mini > train:
            yield (
                f"{key} is more than data.train_batch_size={train}; for one optimiser step with the whole batch write "
                f"{{section}}.ppo_mini_batch_size={train}"
            )
        elif train % mini:
            yield f"data.train_batch_size={train} must be a multiple of {key}"
        sharers = self.ulysses_sequence_parallel_size
        groups = job.processes // sharers
        if not sharing and mini * job.responses % groups:
            yield (
                f"{{section}}.ppo_mini_batch_size * rollout.n = {mini} * {job.responses} = {mini * job.responses} must "
                f"be a multiple of the {groups} {f'groups of {sharers} processes' if sharers > 1 else 'processes'} "
                "(trainer.nnodes * trainer.n_gpus_per_node)"
            )
        if self.use_dynamic_bsz:
            name = "{section}.ppo_max_token_len_per_gpu"
            yield from self.budget_mistakes(job.data, name, self.ppo_max_token_len_per_gpu)
