"""What stands in a result file: one line a question, in the published layout plus optional keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from xbai.errors import UserError
from xbai.search.choice import best_candidate

T = TypeVar("T")

REFUSED = "refused"
PRUNED, NOT_BEGUN = "pruned", "not_begun"
"""Of a run with a budget (see `xbai.search.rule`): given up on the way; never begun."""
NOT_CHOSEN = "not_chosen"
"""Of a run that answers once: a candidate as far as it was written before another was chosen to answer."""
WITHOUT_SCORE = (REFUSED, PRUNED, NOT_BEGUN)
"""Finish reasons of samples that are complete without one."""
JOURNAL_SUFFIX = ".journal"
"""Of the file beside it that holds the samples of an unfinished run."""

_COLUMNS = {
    "score_lst": "score",
    "sample_lst": "sample",
    "finish_reason_lst": "finish_reason",
    "token_count_lst": "token_count",
    "step_score_lst": "step_scores",
    "seconds_lst": "seconds",
    "error_lst": "error",
    "mean_log_prob_lst": "mean_log_prob",
    "step_end_lst": "step_ends",
    "step_log_prob_lst": "step_log_probs",
}
"""The lists of a line beside `solution_lst`, in their order, each with the attribute of a `Sample` that it holds."""

SampleKey = tuple[int, int]
"""(question index, sample index)."""


@dataclass(frozen=True)
class StoredQuestion:
    """What a result line says of its question; `prompt` has the chat template applied."""

    index: int
    prompt: str
    answer: Any
    meta: dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One response to one question.

    Attributes:
        question: index of the question; None in files that do not number theirs.
        sample: index among the samples of the question.
        response: the text; empty where the service refused, up to the step after which it was pruned.
        finish_reason: `stop`, `length`, `NOT_CHOSEN`, or one of `WITHOUT_SCORE`.
        token_count: generated tokens, of a search all that it generated, of a pruned one those that came too late to be
            in the text too; None when the service does not say.
        seconds: how long its request took.
        score: trajectory score; None when it is not known (yet).
        step_scores: scores of its steps; None when not known.
        error: why the service refused.
        mean_log_prob: mean log-prob of its tokens at the sampling temperature; None when not known, and of a search.
        step_ends: for each of `step_scores`, the number of tokens up to and including the step's last; None unless the
            service that generated found the steps.
        step_log_probs: the log-probs summed over each step, and over what follows the last one; None when not known.
    """

    question: int | None
    sample: int
    response: str
    finish_reason: str | None = None
    token_count: int | None = None
    seconds: float = 0.0
    score: float | None = None
    step_scores: list[float] | None = None
    error: str | None = None
    mean_log_prob: float | None = None
    step_ends: list[int] | None = None
    step_log_probs: list[float] | None = None

    @property
    def score_to_choose_by(self) -> float | None:
        """The score, of those that may be the response."""
        return None if self.finish_reason == NOT_CHOSEN else self.score

    @property
    def key(self) -> SampleKey:
        """What identifies it within a run."""
        if self.question is None:
            raise ValueError("a sample of a question without a number")
        return self.question, self.sample


@dataclass(frozen=True)
class ResultLine:
    """One question of a result file, and the samples of responses to it.

    Attributes:
        index: of the question in its benchmark; None where the file does not say.
        prompt: with the chat template applied.
        answer, meta: what the benchmark says of it.
        content: the response that was chosen.
        time: seconds of the slowest.
        settings: how the responses were made; None where the file does not say.
    """

    index: int | None
    prompt: str
    answer: Any
    meta: dict[str, Any]
    samples: list[Sample]
    content: str
    time: float
    settings: dict[str, Any] | None

    @property
    def responses(self) -> list[str]:
        """The texts of the samples."""
        return [sample.response for sample in self.samples]

    def to_json(self) -> str:
        """The line: the published layout plus optional keys. Item i of every list of `output` belongs to sample i."""
        output = {
            "content": self.content,
            "time": self.time,
            "solution_lst": [self.prompt + response for response in self.responses],
            **{column: [getattr(sample, name) for sample in self.samples] for column, name in _COLUMNS.items()},
        }
        line = {
            "prompt": self.prompt,
            "answer": self.answer,
            "output": output,
            "index": self.index,
            "meta": self.meta,
            "settings": self.settings,
        }
        return json.dumps(line, ensure_ascii=False, default=str)

    @classmethod
    def from_json(cls, text: str) -> ResultLine:
        """The inverse of `to_json`; also reads lines that have the published keys only, in either form of them.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: it is none.
        """
        line = json.loads(text)
        solutions = line["output"]["solution_lst"]
        columns: dict[str, Sequence[Any]] = {}
        for key, name in _COLUMNS.items():
            if values := line["output"].get(key):
                if len(values) != len(solutions):
                    raise ValueError(f"solution_lst has {len(solutions)} items, {key} {len(values)}")
                columns[name] = values
        line = _from_published_form(line)
        prompt, index, output = line["prompt"], line.get("index"), line["output"]
        columns = {
            "question": [index] * len(solutions),
            "sample": range(len(solutions)),
            "response": [solution.removeprefix(prompt) for solution in solutions],
            **columns,
        }
        return cls(
            index=index,
            prompt=prompt,
            answer=line.get("answer"),
            meta=line.get("meta") or {},
            samples=[Sample(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)],
            content=output.get("content", ""),
            time=output.get("time", 0.0),
            settings=line.get("settings"),
        )


def _from_published_form(line: dict[str, Any]) -> dict[str, Any]:
    """A line that XBai's own pipeline wrote, in this one's form.

    Its `prompt` is the question as it stands in the benchmark, and its `content` is the prompt with the chat template
    applied, with which all solutions begin.
    """
    output = line["output"]
    prompt, solutions, scores = output.get("content"), output["solution_lst"], output.get("score_lst")
    is_ours = "settings" in line or "sample_lst" in output
    if is_ours or not prompt or not solutions or not all(text.startswith(prompt) for text in solutions):
        return line
    best = solutions[best_candidate(scores)].removeprefix(prompt) if scores else ""
    return {**line, "prompt": prompt, "meta": {"question": line["prompt"]}, "output": {**output, "content": best}}


def read_result_lines(path: Path) -> Iterator[ResultLine]:
    """The lines of a result file.

    Raises:
        UserError: names the line that is not one.
    """
    return parsed_lines(path, ResultLine.from_json, "not a result line")


def parsed_lines(path: Path, parse: Callable[[str], T], problem: str) -> Iterator[T]:
    """What `parse` makes of every line that is not blank.

    Raises:
        UserError: names the line of which it makes nothing, and says that `problem`.
    """
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                yield parse(line.decode())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path}:{number}: {problem} ({error!r})") from None
