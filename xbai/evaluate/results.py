"""What stands in a result file: one line a question, in the published layout plus optional keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xbai.errors import UserError
from xbai.search.best_of_n import best_candidate

REFUSED = "refused"

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
        question, sample: indices.
        response: the text; empty where the service refused.
        finish_reason: `stop`, `length`, or `refused`.
        token_count: generated tokens, of a search all that it generated; None when the service does not say.
        seconds: how long its request took.
        score: trajectory score; None when it is not known (yet).
        step_scores: scores of its steps; None when not known.
        error: why the service refused.
        mean_log_prob: mean log-prob of its tokens at the sampling temperature; None when not known, and of a search.
    """

    question: int
    sample: int
    response: str
    finish_reason: str | None = None
    token_count: int | None = None
    seconds: float = 0.0
    score: float | None = None
    step_scores: list[float] | None = None
    error: str | None = None
    mean_log_prob: float | None = None

    @property
    def key(self) -> SampleKey:
        """What identifies it."""
        return self.question, self.sample


@dataclass(frozen=True)
class ResultLine:
    """One question of a result file, in the published layout plus optional keys.

    `content` is the response that was chosen. The lists are parallel: item i belongs to `solutions[i]`, which is
    `prompt` + response.
    """

    prompt: str
    answer: Any
    content: str
    time: float
    solutions: list[str]
    scores: list[float | None]
    index: int | None
    meta: dict[str, Any]
    settings: dict[str, Any] | None
    sample_indices: list[int]
    finish_reasons: list[str | None]
    token_counts: list[int | None]
    step_scores: list[list[float] | None]
    seconds: list[float]
    errors: list[str | None]
    mean_log_probs: list[float | None]

    @property
    def responses(self) -> list[str]:
        """The solutions without the prompt."""
        return [solution.removeprefix(self.prompt) for solution in self.solutions]

    def samples(self) -> Iterator[Sample]:
        """The line as samples again."""
        for i, response in enumerate(self.responses):
            yield Sample(
                question=self.index,
                sample=self.sample_indices[i],
                response=response,
                finish_reason=self.finish_reasons[i],
                token_count=self.token_counts[i],
                seconds=self.seconds[i],
                score=self.scores[i],
                step_scores=self.step_scores[i],
                error=self.errors[i],
                mean_log_prob=self.mean_log_probs[i],
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, in the published layout."""
        return {
            "prompt": self.prompt,
            "answer": self.answer,
            "output": {
                "content": self.content,
                "time": self.time,
                "solution_lst": self.solutions,
                "score_lst": self.scores,
                "sample_lst": self.sample_indices,
                "finish_reason_lst": self.finish_reasons,
                "token_count_lst": self.token_counts,
                "step_score_lst": self.step_scores,
                "seconds_lst": self.seconds,
                "error_lst": self.errors,
                "mean_log_prob_lst": self.mean_log_probs,
            },
            "index": self.index,
            "meta": self.meta,
            "settings": self.settings,
        }

    @classmethod
    def from_dict(cls, line: dict[str, Any]) -> ResultLine:
        """The inverse of `to_dict`; also reads lines that have the published keys only, in either form of them."""
        solutions = line["output"]["solution_lst"]
        unknown = [None] * len(solutions)
        scores = line["output"].get("score_lst") or unknown
        if len(scores) != len(solutions):
            raise ValueError(f"solution_lst has {len(solutions)} items, score_lst {len(scores)}")
        line = _from_published_form(line)
        output = line["output"]
        return cls(
            prompt=line["prompt"],
            answer=line.get("answer"),
            content=output.get("content", ""),
            time=output.get("time", 0.0),
            solutions=solutions,
            scores=scores,
            index=line.get("index"),
            meta=line.get("meta") or {},
            settings=line.get("settings"),
            sample_indices=output.get("sample_lst") or list(range(len(solutions))),
            finish_reasons=output.get("finish_reason_lst") or unknown,
            token_counts=output.get("token_count_lst") or unknown,
            step_scores=output.get("step_score_lst") or unknown,
            seconds=output.get("seconds_lst") or [0.0] * len(solutions),
            errors=output.get("error_lst") or unknown,
            mean_log_probs=output.get("mean_log_prob_lst") or unknown,
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
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                yield ResultLine.from_dict(json.loads(line.decode()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path}:{number}: not a result line ({error!r})") from None
