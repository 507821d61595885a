"""LiveCodeBench's code generation (Jain et al., arXiv 2403.07974): dated contest problems, graded by their tests."""

from __future__ import annotations

import json
import os
from datetime import date, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from xbai.benchmarks.base import Benchmark, Message, Question, Row
from xbai.errors import UserError
from xbai.grading import GradeRequest

DATA_VARIABLE, DATA_FOLDER = "XBAI_DATA", "data"
"""Environment variable that names the folder with prepared data, and the folder without it."""
RELEASES = ("release_v1", "release_v2", "release_v3", "release_v4", "release_v5", "release_v6")
"""Each holds the one before it."""
DEFAULT_RELEASE = "release_v5"

ROLE = (
    "You will be given a question (problem specification) and will generate a correct Python program that matches the "
    "specification and passes all tests."
)
FORMAT_MARK = "### Format:"
_FUNCTION_FORMAT = (
    f"{FORMAT_MARK} You will use the following starter code to write the solution to the problem and enclose your code "
    "within delimiters.\n```python\n{starter_code}\n```"
)
_PROGRAM_FORMAT = (
    f"{FORMAT_MARK} Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test "
    "on the sample inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, "
    "it reads the inputs, runs the algorithm and writes output to STDOUT.\n```python\n# YOUR CODE HERE\n```"
)
_ANSWER = "### Answer: (use the provided format with backticks)"
_TEST_FIELDS = ("public_test_cases", "private_test_cases", "metadata")


class LiveCodeBench(Benchmark):
    """Reads the published layout, tests packed or not, and what `data/prepare.py` makes of it.

    Tests in files of their own are named in answers, and so in results, by relative paths. They are looked for beside
    the questions, where those were read, and in the folder that the environment variable `XBAI_DATA` names (`data`).

    Args:
        release: the problems of this release, where the file tells releases apart.
        start_date: the problems of contests from this day on, as `YYYY-MM-DD`.
        end_date: those up to this day, itself included.

    Raises:
        UserError: no such release, or a date that is none.
    """

    name = data_source = "livecodebench"
    instruction_marks = (FORMAT_MARK,)

    def __init__(self, release: str | None = None, start_date: str | None = None, end_date: str | None = None) -> None:
        if release is not None and release not in RELEASES:
            raise UserError(f"release {release!r}: known are {', '.join(RELEASES)}")
        self._release = release
        self._start = date.min if start_date is None else _day(start_date, "start_date")
        self._end = date.max if end_date is None else _day(end_date, "end_date")
        self._folders = [Path(os.environ.get(DATA_VARIABLE, DATA_FOLDER))]

    def read(self, path: str | Path) -> list[Question]:
        """Read the questions selected.

        Raises:
            UserError: as for any benchmark; or none of the questions is selected, or the tests of one are missing.
        """
        self._folders.insert(0, Path(path).absolute().parent)
        questions = super().read(path)
        selected = [question for question in questions if self.selects(question, f"{path}: item {question.index + 1}")]
        if not selected:
            raise UserError(f"{path}: none of its {len(questions)} questions is in the release and dates asked for")
        for question in selected:
            self._located(question)
        return selected

    def grade_request(self, question: Question, response: str) -> GradeRequest:
        """What to hand to `GraderPool`, where this machine has the tests.

        Raises:
            UserError: it has not.
        """
        return GradeRequest(self.data_source, response, self._located(question))

    def question_from_row(self, index: int, row: Row, place: str) -> Question:
        """Takes the published layout's names for question, tests and function."""
        if "question_content" in row:
            row = _from_published(row, place)
        return super().question_from_row(index, row, place)

    def answer_from_row(self, row: Row, place: str) -> str:
        """The tests, in the form of `xbai.grading.code_tests`."""
        answer = str(super().answer_from_row(row, place))
        if not {"tests", "file"} & set(_parse(answer, dict, f"{place}: the answer")):
            raise UserError(f"{place}: the answer must hold tests, or the name of their file")
        return answer

    def messages(self, question: Question) -> list[Message]:
        """The published prompt: the question, and the form of the answer, which the starter code decides."""
        if "messages" in question.meta or FORMAT_MARK in question.prompt:
            return super().messages(question)
        starter_code = question.meta.get("starter_code")
        form = _FUNCTION_FORMAT.format(starter_code=starter_code) if starter_code else _PROGRAM_FORMAT
        text = f"{ROLE}\n\n### Question:\n{question.prompt}\n\n{form}\n\n{_ANSWER}\n\n"
        return [{"role": "user", "content": text}]

    def _located(self, question: Question) -> str:
        """The tests of a question, with the absolute path where they are in a file."""
        answer = str(question.answer)
        tests = _in_file(answer)
        if tests is None:
            return answer
        paths = [(folder / tests["file"]).absolute() for folder in self._folders]
        for path in paths:
            if path.is_file():
                return json.dumps({**tests, "file": str(path)})
        raise UserError(
            f"{' and '.join(map(str, dict.fromkeys(paths)))}: no such file of tests; data/prepare.py makes it, and "
            f"{DATA_VARIABLE} names its folder"
        )

    def selects(self, question: Question, place: str) -> bool:
        """Whether a question is in the release and between the dates asked for; `place` is for errors."""
        if self._release is not None:
            release = question.meta.get("release")
            if release not in RELEASES:
                raise UserError(f"{place} names no release: select by dates, or let data/prepare.py make the file")
            if RELEASES.index(release) > RELEASES.index(self._release):
                return False
        if (self._start, self._end) == (date.min, date.max):
            return True
        return self._start <= _day(question.meta.get("contest_date"), f"{place}: contest_date") <= self._end


def _from_published(row: Row, place: str) -> Row:
    metadata = _parse(row.get("metadata") or "{}", dict, f"{place}: metadata")
    answer = {
        "function": metadata.get("func_name"),
        "tests": _parse(row.get("public_test_cases") or "[]", list, f"{place}: public_test_cases"),
        "private_test_cases": row.get("private_test_cases"),
    }
    kept = {name: value for name, value in row.items() if name not in (*_TEST_FIELDS, "question_content")}
    return {"prompt": row["question_content"], "answer": json.dumps(answer, ensure_ascii=False), **kept}


@lru_cache(maxsize=1024)
def _in_file(answer: str) -> dict[str, str] | None:
    """Which file the tests are in; None where the answer itself holds them."""
    tests = json.loads(answer)
    return tests if "file" in tests else None


def _parse(text: str, kind: type, what: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{what} is not valid JSON ({error})") from error
    if not isinstance(value, kind):
        raise UserError(f"{what} must be a JSON {kind.__name__}")
    return value


def _day(text: Any, what: str) -> date:
    try:
        return datetime.fromisoformat(str(text)).date()
    except ValueError as error:
        raise UserError(f"{what} must be a date such as 2024-08-01, not {text!r}") from error
