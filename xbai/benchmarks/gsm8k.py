"""GSM8K (Cobbe et al., arXiv 2110.14168): school word problems with integer answers.

    python -m xbai.benchmarks.gsm8k --source FOLDER --out DIR

makes training files of its published ones, as `python -m xbai.benchmarks.stories` makes them of generated problems.
"""

import re
from pathlib import Path
from random import Random
from typing import Annotated

import typer

from xbai.benchmarks import rows
from xbai.benchmarks.base import READERS, MathBenchmark, Row, read_rows
from xbai.benchmarks.rows import WorkedProblem
from xbai.errors import UserError, exit_on_user_error

ANSWER_MARK = "####"
CALCULATION = re.compile(r"<<.*?>>")
VALIDATION_ROWS = 100
JUDGE_ROWS = 480


def final_answer(solution: str) -> str:
    """What follows `####`, where the published solutions give the answer; the whole text without it."""
    return solution.rpartition(ANSWER_MARK)[-1].strip()


def solution_steps(solution: str) -> list[str]:
    """The lines before `####`, without the calculator's `<<1+1=2>>` and without full stops."""
    lines = CALCULATION.sub("", solution.rpartition(ANSWER_MARK)[0]).splitlines()
    return [step for line in lines if (step := line.strip().rstrip("."))]


class GSM8K(MathBenchmark):
    """Reads the published layout, whose `answer` is a worked solution, too."""

    name = data_source = "gsm8k"

    def answer_from_row(self, row: Row, place: str) -> str | int | float:
        """The final answer alone."""
        answer = super().answer_from_row(row, place)
        return final_answer(answer) if isinstance(answer, str) else answer


def read_problems(path: Path) -> list[WorkedProblem]:
    """The problems of a file in the published layout.

    Raises:
        UserError: the file cannot be read, or a row has no worked solution.
    """
    benchmark, problems = GSM8K(), []
    for index, (row, place) in enumerate(read_rows(path)):
        solution = row.get("answer")
        if not isinstance(solution, str) or not (steps := solution_steps(solution)):
            raise UserError(f"{place}: 'answer' must be a worked solution that ends in '{ANSWER_MARK} NUMBER'")
        question = benchmark.question_from_row(index, row, place)
        prompt, answer = benchmark.messages(question), str(question.answer)
        problems.append(WorkedProblem(benchmark.data_source, "math", question.prompt, prompt, answer, steps))
    return problems


def find_file(folder: Path, split: str) -> Path:
    """The one file of a split, such as `train.jsonl` or `train-00000-of-00001.parquet`.

    Raises:
        UserError: there is none, or there are several.
    """
    found = [path for path in sorted(folder.glob(f"{split}*")) if path.suffix in READERS]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{folder}: needs one file {split}*{{{','.join(READERS)}}} of GSM8K, found {names}")
    return found[0]


def write_splits(source: Path, out_dir: Path, seed: int = 0) -> dict[str, Path]:
    """Write `gsm8k_{sft,train,val}.parquet`, disjoint parts of the published training set, and `gsm8k_test.jsonl`; the
    validation and the end of what is for RL also as questions to sample, `gsm8k_{val,judge}.jsonl`.

    The seed decides which problem goes where: a hundred to validation (at most a tenth), half of the others to
    fine-tuning, half to RL. Returns the path of each part, such as `sft.parquet`.
    """
    train_file, test_file = (find_file(source, split) for split in ("train", "test"))
    problems = read_problems(train_file)
    Random(seed).shuffle(problems)
    held = min(VALIDATION_ROWS, len(problems) // 10)
    validation, rest = problems[:held], problems[held:]
    sft, train = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    parts = {
        "sft.parquet": [problem.sft_row(index) for index, problem in enumerate(sft)],
        "train.parquet": [problem.training_row("train", index) for index, problem in enumerate(train)],
        "val.parquet": [problem.training_row("val", index) for index, problem in enumerate(validation)],
        "test.jsonl": [{"prompt": each.prompt, "answer": each.answer} for each in GSM8K().read(test_file)],
        "val.jsonl": [problem.test_row() for problem in validation],
        "judge.jsonl": [problem.test_row() for problem in train[-JUDGE_ROWS:]],
    }
    return rows.write_parts(out_dir, GSM8K.data_source, parts)


@exit_on_user_error
def main(
    source: Annotated[Path, typer.Option(help="folder with the published files")],
    out: Annotated[Path, typer.Option(help="folder for the files")],
    seed: int = 0,
) -> None:
    """Write training and test files of the published ones."""
    for path in write_splits(source, out, seed).values():
        typer.echo(path)


if __name__ == "__main__":
    typer.run(main)
