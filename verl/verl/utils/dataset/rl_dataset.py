"""Prompts for reinforcement learning, from parquet files."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetsError
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler
from transformers import PreTrainedTokenizerBase

from verl.protocol import object_array
from xbai.errors import UserError
from xbai.parquet import UNREADABLE, not_parquet
from xbai.prompts import chat_messages, most_characters, prompt_text

if TYPE_CHECKING:
    from verl.trainer.config.schema import DataConfig

logger = logging.getLogger(__name__)


def file_list(files: str | Sequence[str] | None) -> list[str]:
    """`data.train_files` and `data.val_files` as a list: they may be one path, several, or nothing."""
    if files is None:
        return []
    return [files] if isinstance(files, str) else list(files)


class RLHFDataset(Dataset):
    """Rows of parquet files with their prompts as token ids.

    An item holds `input_ids`, `attention_mask` and `position_ids` [prompt tokens], `row_index` (its number over all
    files), every other column of the row but the prompt, and the messages as `raw_prompt` if `return_raw_chat`.

    Args:
        data_files: one path or several.
        tokenizer: with a chat template.
        config: reads `prompt_key max_prompt_length filter_overlong_prompts truncation return_raw_chat`.

    Raises:
        UserError: a missing file; a row without a usable prompt, or with one that the chat template does not take
            (named by file and row, from 1); an overlong prompt with `truncation=error`; no row left.
    """

    def __init__(self, data_files: str | Sequence[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self._most_characters = most_characters(config.max_prompt_length, tokenizer)
        files = file_list(data_files)
        parts = _numbered([_read_parquet(file, config.prompt_key) for file in files])
        self._places = [
            f"{file}: row {row}" for file, part in zip(files, parts, strict=True) for row in range(1, len(part) + 1)
        ]
        if config.filter_overlong_prompts:
            parts = [self._without_overlong(part) for part in parts]
            dropped = len(self._places) - sum(map(len, parts))
            logger.info(
                "%d of %d prompts dropped: longer than %d tokens", dropped, len(self._places), config.max_prompt_length
            )
        elif config.truncation == "error":
            self._refuse_overlong(parts)
        else:
            self._check_prompts(parts)
        # One table of them all would need one form of every column, where ground truths may be texts in one file and
        # {"target": ...} in the next.
        self._rows: ConcatDataset[Any] = ConcatDataset(parts)
        if not len(self._rows):
            raise UserError(f"{', '.join(files)}: no prompt of up to {config.max_prompt_length} tokens")

    def _prompt_place(self, index: int) -> str:
        return f"{self._places[index]}: {self.config.prompt_key!r}"

    def _prompts(self, part: datasets.Dataset) -> Iterator[tuple[Any, str]]:
        """The messages of each row as they are in the file, and where they stand."""
        return zip(part[self.config.prompt_key], map(self._prompt_place, part["row_index"]), strict=True)

    def _lengths(self, part: datasets.Dataset) -> Iterator[int | None]:
        """Tokens of each prompt; None for one that is not encoded, because it has too many whatever they are."""
        for messages, place in self._prompts(part):
            text = prompt_text(self.tokenizer, messages, place)
            yield len(self._encode(text)) if len(text) <= self._most_characters else None

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _check_prompts(self, parts: Sequence[datasets.Dataset]) -> None:
        """Before training, where an error is one line, rather than in a process that prepares batches."""
        for messages, place in itertools.chain.from_iterable(map(self._prompts, parts)):
            prompt_text(self.tokenizer, messages, place)

    def _without_overlong(self, part: datasets.Dataset) -> datasets.Dataset:
        limit = self.config.max_prompt_length
        lengths = enumerate(self._lengths(part))
        return part.select([row for row, length in lengths if length is not None and length <= limit])

    def _refuse_overlong(self, parts: Sequence[datasets.Dataset]) -> None:
        limit = self.config.max_prompt_length
        for place, length in zip(self._places, itertools.chain.from_iterable(map(self._lengths, parts)), strict=True):
            if length is None or length > limit:
                found = f"more than {self._most_characters} characters" if length is None else f"{length} tokens"
                raise UserError(
                    f"{place} has a prompt of {found}; raise data.max_prompt_length={limit}, or set "
                    "data.filter_overlong_prompts=true or data.truncation=left|right"
                )

    def values(self, column: str) -> list[Any]:
        """One column of all rows."""
        return [value for part in self._rows.datasets for value in part[column]]

    def places(self) -> list[str]:
        """File and number of every row, for messages."""
        return [self._places[index] for index in self.values("row_index")]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: int) -> dict[str, Any]:
        row = self._rows[item]
        messages, place = row.pop(self.config.prompt_key), self._prompt_place(row["row_index"])
        ids = self._truncated_ids(prompt_text(self.tokenizer, messages, place))
        if self.config.return_raw_chat:
            row["raw_prompt"] = chat_messages(messages, place)
        return {
            **row,
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.ones(len(ids), dtype=torch.long),
            "position_ids": torch.arange(len(ids)),
        }

    def _truncated_ids(self, text: str) -> list[int]:
        # Of a text that is cut far from what is kept, the same tokens are kept.
        limit, characters = self.config.max_prompt_length, 2 * self._most_characters
        if self.config.truncation == "left":
            return self._encode(text[-characters:])[-limit:]
        return self._encode(text[:characters])[:limit]


def _read_parquet(file: str, prompt_key: str) -> datasets.Dataset:
    if not Path(file).is_file():
        raise UserError(f"data files: {file} does not exist")
    try:
        rows = datasets.load_dataset("parquet", data_files=str(file), split="train")
    except (DatasetsError, *UNREADABLE) as error:
        raise not_parquet(f"{file}:", error.__cause__ or error) from error
    if prompt_key not in rows.column_names:
        raise UserError(f"{file}: no column {prompt_key!r} (data.prompt_key); it has {', '.join(rows.column_names)}")
    return rows


def _numbered(parts: Sequence[datasets.Dataset]) -> list[datasets.Dataset]:
    """Add each row's number over all parts, as `row_index`."""
    ends = itertools.accumulate(map(len, parts))
    return [
        part.add_column("row_index", list(range(end - len(part), end))) for end, part in zip(ends, parts, strict=True)
    ]


def collate_fn(items: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor | np.ndarray]:
    """Stack items: tensors [rows, longest prompt], padded on the left, everything else as arrays of objects."""
    width = max(len(item["input_ids"]) for item in items)
    fill = {"input_ids": pad_token_id, "attention_mask": 0, "position_ids": 0}

    def padded(key: str) -> Tensor:
        return torch.stack([torch.nn.functional.pad(i[key], (width - len(i[key]), 0), value=fill[key]) for i in items])

    # Files may have different optional columns; a row that lacks one has None there.
    others = dict.fromkeys(key for item in items for key in item if key not in fill)
    return {key: padded(key) for key in fill} | {key: object_array(item.get(key) for item in items) for key in others}


def create_dataloader(
    dataset: RLHFDataset, batch_size: int, *, shuffle: bool, seed: int, num_workers: int = 0
) -> StatefulDataLoader:
    """Endlessly restartable batches of whole size, whose `state_dict` resumes at the very next one.

    With `shuffle` they have a new order every epoch, by `seed`. `num_workers` processes prepare them ahead; with 0 this
    one does. Fewer rows than one batch are a `UserError`.
    """
    if len(dataset) < batch_size:
        raise UserError(f"data.train_batch_size={batch_size} is more than the {len(dataset)} prompts of the data")
    generator = torch.Generator().manual_seed(seed)
    return StatefulDataLoader(
        dataset,
        batch_size=batch_size,
        sampler=RandomSampler(dataset, generator=generator) if shuffle else None,
        collate_fn=lambda items: collate_fn(items, dataset.tokenizer.pad_token_id),
        drop_last=True,
        num_workers=num_workers,
    )
