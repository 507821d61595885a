"""Results on disk: a journal that survives any death of the process, and the result file made from it.

While a run goes on, every finished sample is one line appended to `OUT.journal` (written at once, fsynced as often as
its `sync` is called): first a line of settings, then samples, then scores that came later. When the run ends with what
could be had, `OUT` is written in one piece, one line a question, and the journal is removed. A run started again reads
both and asks only for the rest, which includes what stood in lines of the journal that are damaged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from xbai.errors import UserError
from xbai.files import atomic_write, check_writable, is_replaced
from xbai.infer.journal import Journal, JournalLine, Place
from xbai.results.lines import (
    JOURNAL_SUFFIX,
    WITHOUT_SCORE,
    ResultLine,
    Sample,
    SampleKey,
    StoredQuestion,
    read_result_lines,
)
from xbai.results.response_choice import Choose, response_choice
from xbai.results.settings import RunSettings

logger = logging.getLogger(__name__)


class ResultStore:
    """The samples of one run. Texts stay on disk; memory holds where they are, and their scores.

    Use as a context manager; `write_results` makes the result file.

    Args:
        path: the result file; its journal lies beside it.
        settings: what all results of the file share.
        questions: those of this run. The file may hold others (of another part), which it keeps.

    Attributes:
        journal: what finished samples are added to, while the store is open.
    """

    def __init__(self, path: str | Path, settings: RunSettings, questions: Sequence[StoredQuestion]) -> None:
        self.path = Path(path)
        self.journal_path = self.path.with_name(self.path.name + JOURNAL_SUFFIX)
        self._settings = settings
        self._questions = {question.index: question for question in questions}
        self._places: dict[SampleKey, Place] = {}
        self._scores: dict[SampleKey, tuple[float | None, list[float] | None]] = {}
        self._damaged: list[int] = []

    def __enter__(self) -> ResultStore:
        """Open, repair and read what an earlier run left.

        Raises:
            UserError: another process is writing, the files hold results of other settings or questions, or where the
                journal says how its run was made it is damaged.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.journal = self._open_journal()
        try:
            self._read_journal()
            self._import_results()
        except BaseException:
            self.journal.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.journal.close()

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def record(self, **models: str | None) -> None:
        """Note which models make what is to come, as far as they are known: `policy`, `scorer` and its `lang`.

        Raises:
            UserError: others made what is there.
        """
        known: dict[str, Any] = {name: value for name, value in models.items() if value is not None}
        settings = replace(self._settings, **known)
        settings.check_same(self._settings.to_dict(), self.path)
        if settings != self._settings:
            self._settings = settings
            self._append_settings()

    def unscored(self) -> list[SampleKey]:
        """Samples whose score never came, or failed in an earlier run."""
        return sorted(key for key, (score, _) in self._scores.items() if score is None)

    def complete(self) -> list[SampleKey]:
        """Samples that have all they will get: a score, or a reason to have none."""
        return sorted(key for key in self._places if self._scores.get(key, (0.0,))[0] is not None)

    def add(self, *samples: Sample) -> None:
        """Keep finished samples, with their scores where they are known; those of one call are written in one go.

        Raises:
            ValueError: one is there already.
        """
        for sample in samples:
            if sample.key in self._places:
                raise ValueError(f"question {sample.question}, sample {sample.sample} is there already")
        for sample, place in zip(samples, self.journal.append(*map(asdict, samples)), strict=True):
            self._remember(sample, place)

    def add_score(self, key: SampleKey, score: float, step_scores: list[float] | None = None) -> None:
        """Keep the score of a sample that is there."""
        if key not in self._places:
            raise KeyError(key)
        self.journal.append({"question": key[0], "sample": key[1], "score": score, "step_scores": step_scores})
        self._scores[key] = score, step_scores

    def get(self, key: SampleKey) -> Sample:
        """Read a sample back.

        Raises:
            UserError: its line has been damaged since it was written.
        """
        record = self.journal.read(self._places[key])
        score, step_scores = self._scores.get(key, (None, None))
        return Sample(**{**record, "score": score, "step_scores": step_scores})

    def write_results(self) -> None:
        """Write the result file and remove the journal: after this the store is closed."""
        keys = {index: list(group) for index, group in groupby(sorted(self._places), key=itemgetter(0))}
        others = [line for line in self._existing_lines() if line.index not in self._questions]
        with response_choice(self._settings.to_dict()) as choose, atomic_write(self.path) as stream:
            ours = (self._line(question, keys.get(index, []), choose) for index, question in self._questions.items())
            for line in chain(others, ours):
                stream.write(line.to_json().encode() + b"\n")
        self.journal.remove()

    def _line(self, question: StoredQuestion, keys: Sequence[SampleKey], choose: Choose) -> ResultLine:
        samples = [self.get(key) for key in keys]
        return ResultLine(
            index=question.index,
            prompt=question.prompt,
            answer=question.answer,
            meta=question.meta,
            samples=samples,
            content=choose([sample.response for sample in samples], [sample.score_to_choose_by for sample in samples]),
            time=max((sample.seconds for sample in samples), default=0.0),
            settings=self._settings.to_dict(),
        )

    def _remember(self, sample: Sample, place: Place) -> None:
        self._places[sample.key] = place
        if sample.finish_reason not in WITHOUT_SCORE:
            self._scores[sample.key] = sample.score, sample.step_scores

    def _append_settings(self) -> None:
        self.journal.append({"settings": self._settings.to_dict()})

    def _open_journal(self) -> Journal:
        try:
            return Journal(self.journal_path)
        except BlockingIOError:
            raise UserError(
                f"{self.path}: another run is writing it; wait for it, or choose another --output_file "
                "(each --part that runs at the same time needs its own)"
            ) from None

    def _read_journal(self) -> None:
        for line in self.journal.lines():
            if line.tells_settings or line.place[0] == 0:
                self._replay_settings(line)
            elif not self._replay(line):
                self._damaged.append(line.number)
        if self.journal.cut_off():
            logger.warning("%s: the last line was cut off; what it held is asked for again", self.journal_path)
        if self._damaged:
            logger.warning(
                "%s: damaged lines: %d, the first is line %d; what they held is asked for again",
                self.journal_path,
                len(self._damaged),
                self._damaged[0],
            )
        if self.journal.size == 0:
            self._append_settings()

    def _replay_settings(self, line: JournalLine) -> None:
        found = None if line.record is None else line.record.get("settings")
        if not isinstance(found, dict):
            raise UserError(
                f"{self.journal_path}:{line.number}: damaged where it says how the run was made; put the line right "
                "(docs/formats.md says how), or remove the file to begin anew"
            )
        self._settings.check_same(found, self.journal_path)
        self._settings = self._settings.completed_by(found)

    def _replay(self, line: JournalLine) -> bool:
        """Take over a sample, or a score; whether the line holds one.

        Of several lines of a sample the first counts, and so does the first score that stands behind it. A score that
        stands before it was of another one, whose line is damaged.
        """
        record: dict[str, Any] = line.record or {}
        match record:
            case {"question": int(question), "sample": int(number), "response": str()}:
                try:
                    sample = Sample(**record)
                except TypeError:
                    return False
                self._check_question(question)
                if (question, number) not in self._places:
                    self._remember(sample, line.place)
            case {
                "question": int(question),
                "sample": int(number),
                "score": int() | float() | None as score,
                "step_scores": list() | None as steps,
                **more,
            } if not more:
                self._check_question(question)
                if self._scores.get((question, number), (0.0,))[0] is None:
                    self._scores[question, number] = score, steps
            case _:
                return False
        return True

    def _check_question(self, question: int) -> None:
        if question not in self._questions:
            raise UserError(
                f"{self.journal_path}: an unfinished run of other questions (question {question}); finish it first, "
                "or choose another --output_file"
            )

    def _import_results(self) -> None:
        """Take over the samples of a result file that an earlier run finished."""
        try:
            lines = list(self._existing_lines())
        except UserError:
            if not self._places and not self._damaged:
                self.journal_path.unlink()
            raise
        for line in lines:
            self._settings = self._settings.completed_by(line.settings or {})
            if line.index in self._questions:
                for sample in line.samples:
                    if sample.key not in self._places:
                        self.add(sample)

    def _existing_lines(self) -> Iterator[ResultLine]:
        if not self.path.exists():
            return
        for line in read_result_lines(self.path):
            self._settings.check_same(line.settings or {}, self.path)
            yield line


def check_result_file(path: str | Path) -> None:
    """Refuse a name that cannot be a result file's (call it before anything is asked of a service).

    Raises:
        UserError: says why.
    """
    check_writable(path)
    if not is_replaced(path):
        raise UserError(
            f"--output_file {path}: no regular file, but results are read back, and lie beside it until all are there; "
            "name one"
        )
