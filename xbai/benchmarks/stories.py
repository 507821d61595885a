"""Stories, the embedded task of a real language model: word problems with small numbers and worked solutions.

Four kinds of them are for training, validation and test; five others, which training never sees, are a test of their
own. Nothing is downloaded: every question is made here, from a seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated

import typer

from xbai.benchmarks import rows
from xbai.benchmarks.base import Benchmark, Row
from xbai.benchmarks.rows import WorkedProblem
from xbai.benchmarks.story_kinds import HELD_OUT, SEEN, StoryKind
from xbai.errors import UserError
from xbai.prompts import Message

DATA_SOURCE = "stories"


class Stories(Benchmark):
    """Questions without an instruction: their form of answer is learnt."""

    name = data_source = DATA_SOURCE


@dataclass(frozen=True)
class SplitSizes:
    """Questions of each file; none stands in two, but the judge's are the last of those for training."""

    sft: int = 8_000
    train: int = 8_000
    judge: int = 480
    validation: int = 100
    test: int = 300
    held_out: int = 150


def sample_problems(count: int, kinds: Mapping[str, StoryKind], rng: Random, used: set[str]) -> list[WorkedProblem]:
    """`count` problems, as many of each kind, whose questions are not among `used`, to which they are added.

    Raises:
        UserError: there are not that many.
    """
    names, problems = sorted(kinds), list[WorkedProblem]()
    for _ in range(20 * count + 1000):
        if len(problems) == count:
            return problems
        kind = names[len(problems) % len(names)]
        story = kinds[kind](rng)
        if story.question not in used:
            used.add(story.question)
            prompt: list[Message] = [{"role": "user", "content": story.question}]
            answer, extra = str(story.answer), {"kind": kind}
            problems.append(
                WorkedProblem(DATA_SOURCE, "arithmetic", story.question, prompt, answer, story.steps, extra)
            )
    raise UserError(f"stories: cannot find {count} different questions of the kinds {', '.join(names)}; ask for fewer")


def _test_rows(problems: list[WorkedProblem]) -> list[Row]:
    return [{**problem.test_row(), "solution": problem.response} for problem in problems]


def write_splits(out_dir: str | Path, seed: int = 0, sizes: SplitSizes | None = None) -> dict[str, Path]:
    """Write the SFT, RL training, validation and test files.

    The same seed gives the same questions. Returns the path of each part, such as `sft.parquet`.
    """
    sizes, rng, used = sizes or SplitSizes(), Random(seed), set[str]()
    # The tests come first, so that they do not change with the amount of training data.
    test = sample_problems(sizes.test, SEEN, rng, used)
    held_out = sample_problems(sizes.held_out, HELD_OUT, rng, used)
    validation = sample_problems(sizes.validation, SEEN, rng, used)
    train = sample_problems(sizes.train, SEEN, rng, used)
    sft = sample_problems(sizes.sft, SEEN, rng, used)
    parts = {
        "sft.parquet": [problem.sft_row(i) for i, problem in enumerate(sft)],
        "train.parquet": [problem.training_row("train", i) for i, problem in enumerate(train)],
        "judge.jsonl": _test_rows(train[max(0, len(train) - sizes.judge) :]),
        "val.parquet": [problem.training_row("val", i) for i, problem in enumerate(validation)],
        "val.jsonl": _test_rows(validation),
        "test.jsonl": _test_rows(test),
        "heldout.jsonl": _test_rows(held_out),
    }
    return rows.write_parts(Path(out_dir), DATA_SOURCE, parts)


def main(
    out: Annotated[Path, typer.Option(help="folder for the files")],
    seed: int = 0,
    judge: Annotated[int, typer.Option(min=1, max=SplitSizes.train, help="questions for a head")] = SplitSizes.judge,
) -> None:
    """Write the data files of the stories."""
    for path in write_splits(out, seed, SplitSizes(judge=judge)).values():
        typer.echo(path)


if __name__ == "__main__":
    typer.run(main)
