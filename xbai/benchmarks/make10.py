"""Make 10, the embedded task: put + or - between the given numbers, in order, so that the result is 10.

Problems, the teacher whose text the tiny model learns from, and the data files are all made here, from a seed. The
teacher is noisy on purpose: it gives up after a few attempts, claims success falsely and slips in its arithmetic, so
that about half of its answers are wrong and there is something for the score head to tell apart and for RL to mend.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from xbai.benchmarks import rows
from xbai.benchmarks.base import Benchmark, Row
from xbai.errors import UserError
from xbai.grading.make10 import TARGET, grade_make10

DATA_SOURCE = "make10"
LARGEST_PARTIAL = 20
LARGEST_NUMBER = 9
MIN_PATTERNS = 3
MIN_SOLUTIONS = 1

Numbers = tuple[int, ...]
Pattern = str
"""The signs between the numbers, such as `+-+-`."""


def question_text(numbers: Numbers) -> str:
    """What the user asks."""
    return f"Make {TARGET} from {' '.join(map(str, numbers))}"


def expression(numbers: Numbers, pattern: Pattern) -> str:
    """The numbers with the signs between them."""
    return str(numbers[0]) + "".join(f"{sign}{number}" for sign, number in zip(pattern, numbers[1:], strict=True))


def valid_patterns(numbers: Numbers) -> dict[Pattern, int]:
    """Every sign pattern whose partial results all lie within 0..20, with its final result."""
    results = {"": numbers[0]}
    for number in numbers[1:]:
        results = {
            pattern + sign: partial
            for pattern, value in results.items()
            for sign, partial in (("+", value + number), ("-", value - number))
            if 0 <= partial <= LARGEST_PARTIAL
        }
    return results


def is_fair(numbers: Numbers) -> bool:
    """Whether the problem can be solved and can be missed: enough patterns to try, some but not all of them right."""
    results = valid_patterns(numbers)
    solutions = sum(result == TARGET for result in results.values())
    return len(results) >= MIN_PATTERNS and MIN_SOLUTIONS <= solutions < len(results)


@dataclass(frozen=True)
class Teacher:
    """Writes one noisy solution: attempts, each one step that ends in a verdict, then the answer.

    Nearly all of its mistakes show in the text. Hidden ones (a result bent so that the chain ends in 10, a miscopied
    answer) were tried and left out: the policy learns to make them sooner than the head learns to find them.
    """

    attempt_weights: tuple[int, ...] = (25, 25, 18, 14, 10, 8)
    """Relative frequency of giving up after 1, 2, ... attempts."""
    missed_hit_rate: float = 0.02
    """How often a hit is taken for a miss."""
    false_yes_rate: float = 0.25
    """How often the last attempt, a miss, is claimed to be a hit (else it is called close)."""
    slip_rate: float = 0.005
    """Chance that an operation's result is off by one or two."""

    def solve(self, numbers: Numbers, rng: random.Random) -> str:
        """The text of one response, right or wrong."""
        limit = rng.choices(range(1, len(self.attempt_weights) + 1), self.attempt_weights)[0]
        valid = sorted(valid_patterns(numbers))
        attempts = rng.sample(valid, k=min(limit, len(valid)))
        steps = []
        for left, pattern in zip(range(len(attempts) - 1, -1, -1), attempts, strict=True):
            results = self._calculate(numbers, pattern, rng)
            verdict = self._verdict(results[-1], left == 0, rng)
            steps.append(f"{chain(numbers, pattern, results)} {verdict}.\n\n")
            if verdict != "no":
                break
        answer = expression(numbers, pattern)
        return f"<think>\n{''.join(steps)}So {answer}.\n\n</think>\n\nThe answer is \\boxed{{{answer}}}."

    def _calculate(self, numbers: Numbers, pattern: Pattern, rng: random.Random) -> list[int]:
        value, results = numbers[0], []
        for sign, number in zip(pattern, numbers[1:], strict=True):
            value += number if sign == "+" else -number
            if rng.random() < self.slip_rate:
                value += rng.choice((-2, -1, 1, 2))
            # After a slip the rest of the pattern may lead out of the range.
            value = min(max(value, 0), LARGEST_PARTIAL)
            results.append(value)
        return results

    def _verdict(self, result: int, last: bool, rng: random.Random) -> str:
        if result == TARGET:
            return "no" if not last and rng.random() < self.missed_hit_rate else "yes"
        if not last:
            return "no"
        return "yes" if rng.random() < self.false_yes_rate else "close"


def chain(numbers: Numbers, pattern: Pattern, results: list[int]) -> str:
    """The calculation with its partial results, such as `7+8=15-1=14`."""
    operations = zip(pattern, numbers[1:], results, strict=True)
    return str(numbers[0]) + "".join(f"{sign}{number}={result}" for sign, number, result in operations)


class Make10(Benchmark):
    """The right answer of a question is its numbers."""

    name = data_source = DATA_SOURCE


@dataclass(frozen=True)
class SplitSizes:
    """Rows of each file; no problem stands in two files, and within the last three each row is a problem of its own."""

    sft: int = 12_800
    sft_problems: int = 9_000
    train: int = 4_000
    validation: int = 100
    test: int = 400


def sample_problems(count: int, rng: random.Random, length: int = 5) -> list[Numbers]:
    """`count` different fair problems.

    Raises:
        UserError: there are not that many.
    """
    found: dict[Numbers, None] = {}
    for _ in range(50 * count + 1000):
        if len(found) == count:
            return list(found)
        numbers = tuple(rng.randint(1, LARGEST_NUMBER) for _ in range(length))
        if numbers not in found and is_fair(numbers):
            found[numbers] = None
    raise UserError(f"make10: cannot find {count} different problems of {length} numbers; ask for fewer or longer ones")


def problem_row(numbers: Numbers, split: str, index: int) -> Row:
    """One problem in the trainer's row layout; the ground truth is the numbers."""
    prompt = [{"role": "user", "content": question_text(numbers)}]
    return rows.training_row(DATA_SOURCE, prompt, " ".join(map(str, numbers)), "arithmetic", split=split, index=index)


def sft_row(numbers: Numbers, teacher: Teacher, rng: random.Random, index: int) -> Row:
    """One problem with a response of the teacher and whether its answer is right."""
    row = problem_row(numbers, "sft", index)
    response = teacher.solve(numbers, rng)
    return {**row, "response": response, "correct": grade_make10(response, row["reward_model"]["ground_truth"])}


def write_splits(
    out_dir: str | Path, seed: int = 0, sizes: SplitSizes | None = None, length: int = 5
) -> dict[str, Path]:
    """Write the SFT, RL training, validation and test files of problems with `length` numbers.

    The same seed gives the same bytes of text. Returns the path of each part, such as `sft.parquet`.
    """
    sizes, rng, teacher = sizes or SplitSizes(), random.Random(seed), Teacher()
    counts = (sizes.sft_problems, sizes.train, sizes.validation, sizes.test)
    problems: Iterator[Numbers] = iter(sample_problems(sum(counts), rng, length))
    sft, train, validation, test = ([next(problems) for _ in range(count)] for count in counts)
    parts = {
        "sft.parquet": [sft_row(sft[i % len(sft)], teacher, rng, i) for i in range(sizes.sft)],
        "train.parquet": [problem_row(numbers, "train", i) for i, numbers in enumerate(train)],
        "val.parquet": [problem_row(numbers, "val", i) for i, numbers in enumerate(validation)],
        "test.jsonl": [{"prompt": question_text(numbers), "answer": " ".join(map(str, numbers))} for numbers in test],
    }
    return rows.write_parts(Path(out_dir), DATA_SOURCE, parts)


def main(out: Annotated[Path, typer.Option(help="folder for the files")], seed: int = 0, length: int = 5) -> None:
    """Write the Make 10 data files."""
    for path in write_splits(out, seed, length=length).values():
        typer.echo(path)


if __name__ == "__main__":
    typer.run(main)
