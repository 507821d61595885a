"""Prompts with their responses for supervised fine-tuning, and batches of rows of like length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from xbai.errors import UserError
from xbai.parquet import UNREADABLE, not_parquet
from xbai.prompts import is_far_longer, prompt_text

if TYPE_CHECKING:
    from verl.trainer.config.sft import SFTData


@dataclass(frozen=True)
class SFTExample:
    """One conversation.

    Attributes:
        ids: token ids of prompt and response, the end-of-turn token included.
        prompt_length: how many of them are prompt.
        correct: whether the response's answer is right; None where the row does not say.
    """

    ids: list[int]
    prompt_length: int
    correct: bool | None


class SFTDataset(Dataset):
    """Rows of parquet files as `SFTExample`s.

    Args:
        files: one path or several.
        tokenizer: with a chat template.
        config: reads `prompt_key response_key label_key max_length`.

    Raises:
        UserError: a missing file or column; a row without prompt or response, whose prompt the chat template does not
            take, or longer than `max_length` (named by file and row, from 1); no row at all.
    """

    def __init__(self, files: str | Sequence[str], tokenizer: PreTrainedTokenizerBase, config: SFTData) -> None:
        self._tokenizer, self._config = tokenizer, config
        files = [files] if isinstance(files, str) else list(files)
        self.examples = [self._example(row, f"{file}: row {n}") for file in files for n, row in self._rows(file)]
        if not self.examples:
            raise UserError(f"data.train_files: {', '.join(files)} hold no rows")

    def _rows(self, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
        if not Path(file).is_file():
            raise UserError(f"data.train_files: {file} does not exist")
        try:
            table = pq.read_table(file)
        except UNREADABLE as error:
            raise not_parquet(f"data.train_files: {file} is", error) from error
        for key, name in (("prompt_key", self._config.prompt_key), ("response_key", self._config.response_key)):
            if name not in table.column_names:
                raise UserError(f"{file}: no column {name!r} (data.{key}); it has {', '.join(table.column_names)}")
        yield from enumerate(table.to_pylist(), start=1)

    def _example(self, row: Mapping[str, Any], place: str) -> SFTExample:
        messages, response = row[self._config.prompt_key], row[self._config.response_key]
        if not isinstance(response, str) or not response:
            raise UserError(f"{place}: {self._config.response_key!r} must be a text, found {response!r:.60}")
        prompt_place = f"{place}: {self._config.prompt_key!r}"
        texts = prompt_text(self._tokenizer, messages, prompt_place), response
        limit = self._config.max_length
        for text in texts:
            if is_far_longer(text, limit, self._tokenizer):
                raise UserError(f"{place} has a text of {len(text)} characters, which no data.max_length={limit} holds")
        prompt, answer = (self._tokenizer.encode(text, add_special_tokens=False) for text in texts)
        ids = [*prompt, *answer, self._tokenizer.eos_token_id]
        if len(ids) > limit:
            raise UserError(f"{place} has {len(ids)} tokens, more than data.max_length={limit}")
        return SFTExample(ids, len(prompt), row.get(self._config.label_key))

    @property
    def has_labels(self) -> bool:
        """Whether any row says how its answer turned out."""
        return any(example.correct is not None for example in self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, item: int) -> SFTExample:
        return self.examples[item]


def length_grouped_batches(
    lengths: Sequence[int], batch_size: int, epoch_seed: int, batches_per_group: int = 8
) -> list[list[int]]:
    """One epoch's batches of row numbers: random rows, but within a batch of like length, so that little is padding.

    Batches are in random order, by `epoch_seed`, the rows of each sorted by length; so many batches' worth of random
    rows are sorted together as `batches_per_group` says. Rows that do not fill a batch are left out.
    """
    generator = torch.Generator().manual_seed(epoch_seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    group = batch_size * batches_per_group
    batches = []
    for start in range(0, len(order), group):
        rows = sorted(order[start : start + group], key=lambda row: lengths[row])
        batches += [rows[i : i + batch_size] for i in range(0, len(rows) - batch_size + 1, batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def collate_examples(examples: Sequence[SFTExample], pad_token_id: int) -> dict[str, Tensor]:
    """Pad on the right.

    Returns:
        `input_ids attention_mask position_ids` [rows, time], `response_mask` [rows, time] bool, `correct` [rows] float
        and `graded` [rows] bool, False where the outcome is not known.
    """
    width = max(len(example.ids) for example in examples)
    columns = torch.arange(width).expand(len(examples), -1)
    ends = torch.tensor([[len(example.ids)] for example in examples])
    starts = torch.tensor([[example.prompt_length] for example in examples])
    return {
        "input_ids": torch.tensor([e.ids + [pad_token_id] * (width - len(e.ids)) for e in examples]),
        "attention_mask": (columns < ends).long(),
        "position_ids": columns,
        "response_mask": (columns >= starts) & (columns < ends),
        "correct": torch.tensor([float(bool(example.correct)) for example in examples]),
        "graded": torch.tensor([example.correct is not None for example in examples]),
    }
