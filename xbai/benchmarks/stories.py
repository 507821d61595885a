"""Stories, the embedded task of a real language model: word problems with small numbers and worked solutions.

Four kinds of them are for training, validation and test; five others, which training never sees, are a test of their
own. Nothing is downloaded: every question is made here, from a seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated

import typer

from xbai.benchmarks.base import Benchmark, Row
from xbai.benchmarks.rows import training_row, worked_response, write_jsonl, write_parquet
from xbai.benchmarks.story import Story
from xbai.benchmarks.story_kinds import HELD_OUT, SEEN, StoryKind
from xbai.errors import UserError

DATA_SOURCE = "stories"


class Stories(Benchmark):
    """Questions without an instruction: their form of answer is learnt."""

    name = data_source = DATA_SOURCE


@dataclass(frozen=True)
class Problem:
    """A story and the name of its kind."""

    kind: str
    story: Story

    @property
    def answer(self) -> str:
        """As the grader compares it."""
        return str(self.story.answer)

    @property
    def response(self) -> str:
        """The worked solution."""
        return worked_response(self.story.steps, self.answer)

    def training_row(self, split: str, index: int) -> Row:
        """In the trainer's layout."""
        prompt = [{"role": "user", "content": self.story.question}]
        return training_row(DATA_SOURCE, prompt, self.answer, "arithmetic", split=split, index=index, kind=self.kind)

    def sft_row(self, index: int) -> Row:
        """The same with the worked solution."""
        return {**self.training_row("sft", index), "response": self.response}

    def evaluation_row(self) -> Row:
        """A line of a test file."""
        return {"prompt": self.story.question, "answer": self.answer, "kind": self.kind, "solution": self.response}


@dataclass(frozen=True)
class SplitSizes:
    """Questions of each file; none stands in two, but the judge's are the last of those for training."""

    sft: int = 8_000
    train: int = 8_000
    judge: int = 480
    validation: int = 100
    test: int = 300
    held_out: int = 150


@dataclass(frozen=True)
class SplitFiles:
    """Where `write_splits` puts each part."""

    folder: Path
    sft: Path = field(init=False)
    train: Path = field(init=False)
    judge: Path = field(init=False)
    validation: Path = field(init=False)
    validation_lines: Path = field(init=False)
    test: Path = field(init=False)
    held_out: Path = field(init=False)

    def __post_init__(self) -> None:
        for name, file in {
            "sft": "stories_sft.parquet",
            "train": "stories_train.parquet",
            "judge": "stories_judge.jsonl",
            "validation": "stories_val.parquet",
            "validation_lines": "stories_val.jsonl",
            "test": "stories_test.jsonl",
            "held_out": "stories_heldout.jsonl",
        }.items():
            object.__setattr__(self, name, Path(self.folder) / file)


def sample_problems(count: int, kinds: Mapping[str, StoryKind], rng: Random, used: set[str]) -> list[Problem]:
    """`count` problems, as many of each kind, whose questions are not among `used`, to which they are added.

    Raises:
        UserError: there are not that many.
    """
    names, problems = sorted(kinds), list[Problem]()
    for _ in range(20 * count + 1000):
        if len(problems) == count:
            return problems
        kind = names[len(problems) % len(names)]
        story = kinds[kind](rng)
        if story.question not in used:
            used.add(story.question)
            problems.append(Problem(kind, story))
    raise UserError(f"stories: cannot find {count} different questions of the kinds {', '.join(names)}; ask for fewer")


def write_splits(out_dir: str | Path, seed: int = 0, sizes: SplitSizes | None = None) -> SplitFiles:
    """Write the SFT, RL training, validation and test files, all from `seed`.

    Args:
        out_dir: folder for the files.
        seed: the same seed gives the same questions.
        sizes: questions of each file.

    Returns:
        The paths written.
    """
    sizes, rng, used, files = sizes or SplitSizes(), Random(seed), set[str](), SplitFiles(Path(out_dir))
    # The tests come first, so that they do not change with the amount of training data.
    test = sample_problems(sizes.test, SEEN, rng, used)
    held_out = sample_problems(sizes.held_out, HELD_OUT, rng, used)
    validation = sample_problems(sizes.validation, SEEN, rng, used)
    train = sample_problems(sizes.train, SEEN, rng, used)
    sft = sample_problems(sizes.sft, SEEN, rng, used)

    write_parquet(files.sft, [problem.sft_row(i) for i, problem in enumerate(sft)])
    write_parquet(files.train, [problem.training_row("train", i) for i, problem in enumerate(train)])
    write_parquet(files.validation, [problem.training_row("val", i) for i, problem in enumerate(validation)])
    lines = {
        files.judge: train[max(0, len(train) - sizes.judge) :],
        files.validation_lines: validation,
        files.test: test,
        files.held_out: held_out,
    }
    for path, problems in lines.items():
        write_jsonl(path, [problem.evaluation_row() for problem in problems])
    return files


def main(
    out: Annotated[Path, typer.Option(help="folder for the files")],
    seed: int = 0,
    judge: Annotated[int, typer.Option(min=1, max=SplitSizes.train, help="questions for a head")] = SplitSizes.judge,
) -> None:
    """Write the data files of the stories."""
    files = write_splits(out, seed, SplitSizes(judge=judge))
    training = (files.sft, files.train, files.judge, files.validation)
    for path in (*training, files.validation_lines, files.test, files.held_out):
        typer.echo(path)


if __name__ == "__main__":
    typer.run(main)
