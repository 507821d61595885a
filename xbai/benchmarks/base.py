"""What every benchmark does: read its file, phrase a question for the model, say how an answer is graded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from xbai.errors import UserError
from xbai.grading import GradeRequest
from xbai.parquet import UNREADABLE, not_parquet
from xbai.prompts import Message, chat_messages

Row = dict[str, Any]

PROMPT_FIELDS = ("prompt", "problem", "question", "model_input")
MAX_LINE_CHARACTERS = 256 << 20
"""Of a file of lines: programs' tests can take many megabytes, but one line without an end must not fill the memory."""
MAX_LIST_BYTES = 2 << 30
PROBE_CHARACTERS = 1 << 16
ANSWER_FIELDS = ("answer", "expected_answer", "ground_truth")


@dataclass(frozen=True)
class Question:
    """One question of a benchmark."""

    index: int
    """Position in the file, from 0."""
    prompt: str
    """What the file asks (of a chat, the last user message)."""
    answer: str | int | float
    """The right answer as the file gives it, a string or a number."""
    meta: dict[str, Any] = field(default_factory=dict)
    """The file's other fields; `messages` where the file holds a whole chat."""
    place: str = ""
    """File and line, for errors."""


class Benchmark:
    """A task with checkable answers."""

    name: str
    """As on the command line."""
    data_source: str
    """Names the grader (see `xbai.grading`)."""
    lang: str = "en"
    """Language of the questions, `en` or `zh`."""
    instruction: str = ""
    """What is added to a question."""
    instruction_marks: tuple[str, ...] = ()
    """Texts of which any one in a question says that it carries its instruction already."""

    def read(self, path: str | Path) -> list[Question]:
        """Read a .jsonl, .json or .parquet file.

        Raises:
            UserError: no such file, another kind of file, or a row without prompt or answer (with its place).
        """
        questions = [
            self.question_from_row(index, row, place) for index, (row, place) in enumerate(read_rows(Path(path)))
        ]
        if not questions:
            raise UserError(f"{path}: holds no questions")
        return questions

    def question_from_row(self, index: int, row: Row, place: str) -> Question:
        """One row of a file as a question; `place` says where it stands, for errors."""
        prompt_field, prompt = _first_present(row, PROMPT_FIELDS, place)
        meta = {name: value for name, value in row.items() if name not in (*PROMPT_FIELDS, *ANSWER_FIELDS)}
        if not isinstance(prompt, str):
            meta["messages"] = _chat(prompt, f"{place}: {prompt_field!r}")
            prompt = _last_question(meta["messages"])
        return Question(index, prompt, self.answer_from_row(row, place), meta, place)

    def answer_from_row(self, row: Row, place: str) -> str | int | float:
        """The right answer of a row, a string or a number."""
        reward_model = row.get("reward_model")
        if isinstance(reward_model, dict) and not any(row.get(name) is not None for name in ANSWER_FIELDS):
            row = {"ground_truth": reward_model.get("ground_truth")}
        answer_field, answer = _first_present(row, ANSWER_FIELDS, place)
        answer = answer.get("target") if isinstance(answer, dict) else answer
        if not isinstance(answer, str | int | float) or str(answer).strip() == "":
            raise UserError(f"{place}: {answer_field!r} must be a string or a number, not {answer!r}")
        return answer

    def messages(self, question: Question) -> list[Message]:
        """The chat to open: the file's own where it holds one, else the question with this benchmark's instruction."""
        if "messages" in question.meta:
            return question.meta["messages"]
        if not self.instruction or any(mark in question.prompt for mark in self.instruction_marks):
            return [{"role": "user", "content": question.prompt}]
        return [{"role": "user", "content": f"{question.prompt}\n{self.instruction}"}]

    def grade_request(self, question: Question, response: str) -> GradeRequest:
        """What to hand to `GraderPool` for a response to `question`."""
        return GradeRequest(self.data_source, response, question.answer)


class MathBenchmark(Benchmark):
    """Questions whose answer is asked for in a box."""

    instruction = "Please reason step by step, and put your final answer within \\boxed{}."
    instruction_marks = ("\\boxed",)


def read_rows(path: Path) -> Iterator[tuple[Row, str]]:
    """The objects of a .jsonl, .json or .parquet file, each with its place for errors.

    Raises:
        UserError: no such file, another kind of file, or one that holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix not in READERS:
        raise UserError(f"{path}: unknown kind of file; use one of {', '.join(READERS)}")
    try:
        for row, place in READERS[path.suffix](path):
            if not isinstance(row, dict):
                raise UserError(f"{place}: expected an object with fields such as 'prompt' and 'answer'")
            yield row, place
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text in UTF-8 ({error})") from error


def _read_lines(path: Path) -> Iterator[tuple[Any, str]]:
    with path.open(encoding="utf-8") as stream:
        lines = iter(lambda: stream.readline(MAX_LINE_CHARACTERS + 1), "")
        for number, line in enumerate(lines, start=1):
            if len(line) > MAX_LINE_CHARACTERS:
                raise UserError(f"{path}:{number}: over {MAX_LINE_CHARACTERS} characters; write one row a line")
            if line.strip():
                yield _parse(line, f"{path}:{number}"), f"{path}:{number}"


def _read_json(path: Path) -> Iterator[tuple[Any, str]]:
    if not _is_list(path):
        yield from _read_lines(path)
        return
    if (size := path.stat().st_size) > MAX_LIST_BYTES:
        raise UserError(f"{path}: a list of {size} bytes is not read in one piece; write it as .jsonl, one row a line")
    text = path.read_text(encoding="utf-8")
    for number, row in enumerate(_parse(text, str(path)), start=1):
        yield row, f"{path}: item {number}"


def _is_list(path: Path) -> bool:
    with path.open(encoding="utf-8") as stream:
        while text := stream.read(PROBE_CHARACTERS):
            if begun := text.lstrip():
                return begun.startswith("[")
    return False


def _read_parquet(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        rows = pq.read_table(path).to_pylist()
    except UNREADABLE as error:
        raise not_parquet(f"{path}:", error) from error
    for number, row in enumerate(rows, start=1):
        yield row, f"{path}: row {number}"


READERS = {".jsonl": _read_lines, ".json": _read_json, ".parquet": _read_parquet}


def _parse(text: str, place: str) -> Any:
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # Half of a surrogate pair is read, but is no character.
            json.dumps(value, ensure_ascii=False).encode()
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON ({error})") from error
    return value


def _first_present(row: Row, names: tuple[str, ...], place: str) -> tuple[str, Any]:
    for name in names:
        if row.get(name) is not None:
            return name, row[name]
    raise UserError(f"{place}: has none of the fields {', '.join(names)} (it has: {', '.join(row)})")


def _chat(prompt: Any, place: str) -> list[Message]:
    if not isinstance(prompt, list):
        raise UserError(f"{place} must be a text or a list of {{role, content}} messages, found {prompt!r:.60}")
    messages = chat_messages(prompt, place)
    if not _last_question(messages):
        raise UserError(f"{place} must hold a message by the user")
    return messages


def _last_question(messages: list[Message]) -> str:
    contents = (message["content"] for message in reversed(messages) if message["role"] == "user")
    return next(filter(None, contents), "")
