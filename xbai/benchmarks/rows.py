"""Rows of the files that generated and converted benchmarks write: for training, and for evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from xbai.benchmarks.base import Row
from xbai.files import atomic_write
from xbai.prompts import Message


def training_row(
    data_source: str, prompt: list[Message], ground_truth: str, ability: str, **extra_info: str | int
) -> dict[str, Any]:
    """One question in the trainer's layout.

    Args:
        data_source: names the grader.
        prompt: the chat that the model answers.
        ground_truth: the right answer.
        ability: what the question asks for, in a word.
        extra_info: what else is known of it.
    """
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


def write_parquet(path: Path, rows: list[Row]) -> None:
    """Write rows of equal columns in one piece."""
    with atomic_write(path) as stream:
        pd.DataFrame(rows).to_parquet(stream)


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Write an object a line, in one piece."""
    with atomic_write(path, "w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
