"""Responses with their grades, whoever sampled them: the driver (result files) or the trainer (its rollouts)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xbai.errors import UserError
from xbai.measure.graded import grade_responses
from xbai.measure.result_set import read_lines, result_files
from xbai.results.lines import REFUSED, parsed_lines
from xbai.sprm.step_features import SUFFIX


@dataclass(frozen=True)
class GradedResponse:
    """One response to a prompt.

    Attributes:
        prompt: with the chat template applied, special tokens as text.
        response: what was written after it.
        correct: in [0, 1]; 0.0 where not graded.
        graded: whether it could be graded.
    """

    prompt: str
    response: str
    correct: float
    graded: bool


def response_files(patterns: Sequence[str]) -> list[Path]:
    """The files that paths, globs and folders (all `.jsonl` in them, or else all features) name, each once.

    Raises:
        UserError: one of them names no file.
    """
    patterns = [_in_folder(Path(pattern)) if Path(pattern).is_dir() else pattern for pattern in patterns]
    return result_files(patterns, "responses")


def _in_folder(folder: Path) -> str:
    return str(folder / ("*.jsonl" if any(folder.glob("*.jsonl")) else f"*{SUFFIX}"))


def read_graded_responses(path: Path, task: str | None = None) -> list[GradedResponse]:
    """All responses of a file, of which a result file is graded here; those that a service refused are left out.

    Args:
        path: a result file, or lines `{"prompt", "response", "correct", "graded"?}`, as the trainer writes them with
            `trainer.rollout_data_dir`.
        task: the benchmark that knows how a result file is graded.

    Raises:
        UserError: a file of another kind, or a result file without `task`.
    """
    if not _is_result_file(path):
        problem = "no object with the texts prompt and response and the number correct"
        return list(parsed_lines(path, _graded_response, problem))
    if task is None:
        raise UserError(f"{path} is a result file: name the benchmark by which it is graded (--task, data.task)")
    lines = read_lines([path], task)
    grades = grade_responses(task, lines)
    return [
        GradedResponse(line.prompt, sample.response, grade or 0.0, grade is not None)
        for number, line in enumerate(lines)
        for sample in line.samples
        if sample.finish_reason != REFUSED
        for grade in [grades[number, sample.response]]
    ]


def _is_result_file(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return "output" in json.loads(next(line for line in stream if line.strip()).decode())
    except (OSError, ValueError, StopIteration, TypeError) as error:
        raise UserError(f"{path}: no lines of JSON with graded responses ({error!r:.80})") from None


def _graded_response(line: str) -> GradedResponse:
    row = json.loads(line)
    graded = bool(row.get("graded", True))
    if not isinstance(row["prompt"], str) or not isinstance(row["response"], str):
        raise TypeError("prompt and response must be texts")
    correct = float(row["correct"]) if graded else 0.0
    if not 0 <= correct <= 1:
        raise ValueError(f"correct is {correct:g}, must be from 0 to 1")
    return GradedResponse(row["prompt"], row["response"], correct, graded)
