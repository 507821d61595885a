"""Files that generated and converted benchmarks write: rows for training, and for evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from xbai.benchmarks.base import Row
from xbai.files import atomic_write
from xbai.prompts import Message


@dataclass(frozen=True)
class WorkedProblem:
    """A question, as the benchmark puts it in `prompt`, with its worked solution (steps without their full stops)."""

    data_source: str
    ability: str
    question: str
    prompt: list[Message]
    answer: str
    steps: Sequence[str]
    extra_info: dict[str, str] = field(default_factory=dict)

    @property
    def response(self) -> str:
        """The worked solution as a model gives it."""
        return worked_response(self.steps, self.answer)

    def training_row(self, split: str, index: int) -> Row:
        """In the trainer's layout."""
        known: dict[str, str | int] = {"split": split, "index": index, **self.extra_info}
        return training_row(self.data_source, self.prompt, self.answer, self.ability, **known)

    def sft_row(self, index: int) -> Row:
        """The same with a response to learn."""
        return {**self.training_row("sft", index), "response": self.response}

    def test_row(self) -> Row:
        """In the benchmark's layout."""
        return {"prompt": self.question, "answer": self.answer, **self.extra_info}


def training_row(
    data_source: str, prompt: list[Message], ground_truth: Any, ability: str, **extra_info: str | int
) -> Row:
    """One question in the trainer's layout; `ability` is what it asks for, in a word."""
    return {
        "data_source": data_source,
        "prompt": prompt,
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": extra_info,
    }


def worked_response(steps: Iterable[str], answer: str) -> str:
    """A response that thinks in `steps`, given without their full stops, and boxes `answer`."""
    thinking = "".join(f"{step}.\n\n" for step in steps)
    return f"<think>\n{thinking}</think>\n\n\\boxed{{{answer}}}"


def write_parts(folder: Path, data_source: str, parts: Mapping[str, list[Row]]) -> dict[str, Path]:
    """Write each part of a set, named such as `train.parquet` or `test.jsonl`; returns the path of each."""
    paths = {name: folder / f"{data_source}_{name}" for name in parts}
    for name, rows in parts.items():
        (write_parquet if name.endswith(".parquet") else write_jsonl)(paths[name], rows)
    return paths


def write_parquet(path: Path, rows: list[Row]) -> None:
    """Write rows of equal columns in one piece."""
    with atomic_write(path) as stream:
        pd.DataFrame(rows).to_parquet(stream)


def write_jsonl(path: Path, rows: Iterable[Row], ensure_ascii: bool = True) -> int:
    """Write an object a line, in one piece; returns how many."""
    written = 0
    with atomic_write(path, "w") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=ensure_ascii) + "\n")
            written += 1
    return written
