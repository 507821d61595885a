"""The prompts of a run, in training and in validation: each can be graded, and has its sampling seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from verl.protocol import DataProto, object_array
from verl.trainer.config.schema import CustomRewardFunction, PPOConfig
from verl.trainer.ppo.curriculum import PassRateCurriculum
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn, create_dataloader
from xbai.errors import UserError
from xbai.grading import CustomGrader, GradeRequest
from xbai.grading.dispatch import answer_check
from xbai.seeds import derived_seed

Loader: TypeAlias = StatefulDataLoader | PassRateCurriculum
"""Gives an epoch's batches, and resumes at the very next one."""


class PromptData:
    """Reads and checks the data files.

    Attributes:
        train, validation: the prompts; None without validation files.
        loader: of training batches: the curriculum, or one that shuffles.
        curriculum: None where prompts are not chosen.
        pad_token_id: fills prompts up to the longest of a batch.
        total_steps: of the run.

    Raises:
        UserError: files that cannot be read, rows that cannot be used or graded.
    """

    def __init__(self, config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        data, trainer = config.data, config.trainer
        self._seed, self.pad_token_id = trainer.seed, tokenizer.pad_token_id
        self.train = RLHFDataset(data.train_files, tokenizer, data)
        self.validation = RLHFDataset(data.val_files, tokenizer, data) if data.val_files else None
        for dataset in filter(None, (self.train, self.validation)):
            columns = dataset.values(data.reward_fn_key), dataset.values("reward_model")
            check_gradable(zip(dataset.places(), *columns, strict=True), config.custom_reward_function)
        size, workers = data.train_batch_size, data.dataloader_num_workers
        self.loader: Loader = create_dataloader(
            self.train, size, shuffle=data.shuffle, seed=trainer.seed, num_workers=workers
        )
        self.curriculum: PassRateCurriculum | None = None
        if data.curriculum.enable:
            self.loader = self.curriculum = PassRateCurriculum(
                self.train, size, data.curriculum.half_life, trainer.seed
            )
        self.total_steps: int = trainer.total_training_steps or trainer.total_epochs * len(self.loader)

    def validation_batches(self, size: int | None) -> Iterator[DataProto]:
        """All validation prompts, `size` at once (None: all of them), with the same seeds every time."""
        if (data := self.validation) is None:
            return
        size = size or len(data)
        for start in range(0, len(data), size):
            items = [data[row] for row in range(start, min(start + size, len(data)))]
            yield self.seeded(self.collated(items), "validation")

    def training_items(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Training prompts by their `row_index`, as the data set gives them."""
        places = {row: place for place, row in enumerate(self.train.values("row_index"))}
        return [self.train[places[row]] for row in rows]

    def collated(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The columns of a batch of items, as of the data set; see `collate_fn`."""
        return collate_fn(items, self.pad_token_id)

    def seeded(self, columns: Mapping[str, Any], occasion: int | str) -> DataProto:
        """A batch whose prompts have their names and sampling seeds of this `occasion`, the number of the batch, say:
        a run that is resumed samples what an uninterrupted one does."""
        prompts = DataProto.from_dict(columns)
        rows = prompts.non_tensor_batch["row_index"]
        prompts.non_tensor_batch["seed"] = object_array(
            derived_seed(self._seed, occasion, row, separator=":", size=4) for row in rows
        )
        prompts.non_tensor_batch["uid"] = object_array(f"{occasion}/{row}" for row in rows)
        return prompts


def check_gradable(rows: Iterable[tuple[str, str, Any]], custom: CustomRewardFunction) -> None:
    """Make sure that every row (where it is, its data source, its `reward_model`) can be graded, before anything is
    generated.

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
            try:
                GradeRequest(source, "", reward_model.get("ground_truth")).target  # noqa: B018
            except ValueError as error:
                raise UserError(
                    f"{place}: 'reward_model' has no ground_truth (text, number or {{target: ...}}), found "
                    f"{reward_model!r:.60}"
                ) from error
