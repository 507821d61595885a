"""The journal: whatever befalls its bytes, a run keeps what is whole, asks for the rest, and takes none for another."""

from __future__ import annotations

import logging
import os
import random
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from journal_flips import OUTCOMES, SETTINGS, JournalTrial, flip_bits, flipped, served

from xbai.errors import UserError
from xbai.infer.journal import encode_line
from xbai.infer.store import ResultStore
from xbai.results.lines import Sample, StoredQuestion

FORMATS = Path(__file__).parents[2] / "docs/formats.md"
QUESTIONS = [StoredQuestion(i, f"<p{i}>", str(i), {}) for i in range(3)]
GOOD = {"same", "asked_again", "refused"}
KEYS = [(question, sample) for question in range(3) for sample in range(2)]
CHANGED = r"damaged at byte \d+ since it was opened"


def store(path: Path) -> ResultStore:
    return ResultStore(path, SETTINGS, QUESTIONS)


def begun(path: Path) -> Path:
    """A journal of one line of settings and one for each of `KEYS`."""
    with store(path) as results:
        results.add(*map(served, KEYS))
    return results.journal_path


@pytest.fixture(autouse=True)
def quick_and_quiet(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here is about a machine that dies, and of hundreds of damaged journals none is news."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    caplog.set_level(logging.ERROR, "xbai")


@pytest.fixture
def trial(tmp_path: Path) -> JournalTrial:
    return JournalTrial(tmp_path)


def test_a_flipped_bit_costs_the_line_that_it_hits_and_nothing_else() -> None:
    flips = 300
    found = flip_bits(flips, seed=12)
    assert found["lost"] == found["silently_wrong"] == found["crashed"] == 0, found
    assert sum(found[name] for name in OUTCOMES) == flips
    assert found["asked_again"] > found["refused"] > 0, found


def test_a_line_whose_end_is_lost_does_not_swallow_the_next(trial: JournalTrial) -> None:
    ends = [i for i, byte in enumerate(trial.journal) if byte == ord("\n")]
    for end in ends[:-1]:
        assert trial.outcome(trial.journal[:end] + trial.journal[end + 1 :]) == "same"
        assert trial.outcome(flipped(trial.journal, 8 * end + end % 8)) in GOOD


def _cut(journal: bytes, place: int, _: random.Random) -> bytes:
    # Not where settings would be lost: a run that was killed before it knew them goes on without them.
    return journal[: max(place, journal.index(b"\n", journal.rindex(b'"settings": ')) + 1)]


def _without_a_byte(journal: bytes, place: int, _: random.Random) -> bytes:
    return journal[:place] + journal[place + 1 :]


def _with_another_byte(journal: bytes, place: int, rng: random.Random) -> bytes:
    return journal[:place] + rng.randbytes(1) + journal[place + 1 :]


def _with_a_newline(journal: bytes, place: int, _: random.Random) -> bytes:
    return journal[:place] + b"\n" + journal[place:]


def _with_zeros(journal: bytes, place: int, _: random.Random) -> bytes:
    return journal[:place] + bytes(len(journal[place : place + 64])) + journal[place + 64 :]


def _with_zeros_behind(journal: bytes, place: int, _: random.Random) -> bytes:
    return journal + bytes(place)


def _with_a_line_twice(journal: bytes, place: int, _: random.Random) -> bytes:
    lines = journal.splitlines(keepends=True)
    which = journal.count(b"\n", 0, place)
    return b"".join(lines[: which + 1] + lines[which:])


def _without_a_line(journal: bytes, place: int, _: random.Random) -> bytes:
    lines = journal.splitlines(keepends=True)
    which = journal.count(b"\n", 0, place)
    return b"".join(lines[:which] + lines[which + (b'"settings": ' not in lines[which]) :])


DAMAGES = [
    _cut,
    _without_a_byte,
    _with_another_byte,
    _with_a_newline,
    _with_zeros,
    _with_zeros_behind,
    _with_a_line_twice,
    _without_a_line,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_other_damage_costs_no_more(trial: JournalTrial, damage: Callable[..., bytes]) -> None:
    rng = random.Random(3)
    for place in rng.sample(range(len(trial.journal)), 25):
        assert trial.outcome(damage(trial.journal, place, rng)) in GOOD, place


def test_swapped_lines_change_nothing_but_what_is_asked_again(trial: JournalTrial) -> None:
    lines = trial.journal.splitlines(keepends=True)
    for i in range(1, len(lines) - 1):
        outcome = trial.outcome(b"".join([*lines[:i], lines[i + 1], lines[i], *lines[i + 2 :]]))
        assert outcome == "same", i


def test_a_score_does_not_go_to_a_response_that_came_after_it(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with store(path) as results:
        results.add(served((1, 1)))
    settings, sample = results.journal_path.read_bytes().splitlines(keepends=True)
    score = encode_line({"question": 1, "sample": 0, "score": 0.9, "step_scores": [0.9]})
    lost = encode_line({**asdict(served((1, 0))), "score": None, "step_scores": None})
    results.journal_path.write_bytes(settings + flipped(lost, 400) + score + sample)
    again = Sample(1, 0, "another response")
    with store(path) as results:
        assert results.unscored() == []
        results.add(again)
        assert results.unscored() == [(1, 0)]
    with store(path) as results:
        assert results.get((1, 0)) == again
        assert results.unscored() == [(1, 0)]


def test_one_line_says_how_much_is_damaged_and_nothing_is_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = begun(tmp_path / "out.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[2], lines[5] = flipped(lines[2], 500), flipped(lines[5], 3)
    journal.write_bytes(b"".join(lines))
    for again in range(2):
        with caplog.at_level(logging.WARNING, "xbai"), store(tmp_path / "out.jsonl") as results:
            assert [key for key in KEYS if key not in results] == ([] if again else [KEYS[1], KEYS[4]])
            if not again:
                results.add(served(KEYS[1]), served(KEYS[4]))
        (said,) = caplog.messages
        assert said == f"{journal}: damaged lines: 2, the first is line 3; what they held is asked for again"
        caplog.clear()
    assert journal.read_bytes().startswith(b"".join(lines))


def test_damaged_settings_are_named_and_the_journal_is_left(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with store(path) as results:
        results.add(served((0, 0)))
        results.record(scorer="s:2b")
        results.add(served((0, 1)))
    whole = results.journal_path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for number in (1, 3):
        for place in (0, 8, 9, 12, 60, len(lines[number - 1]) - 2):
            before, after = lines[: number - 1], lines[number:]
            damaged = b"".join([*before, flipped(lines[number - 1], 8 * place), *after])
            results.journal_path.write_bytes(damaged)
            with (
                pytest.raises(UserError, match=rf"out\.jsonl\.journal:{number}: damaged where it says how"),
                store(path),
            ):
                pass
            assert results.journal_path.read_bytes() == damaged
    results.journal_path.write_bytes(whole)
    with store(path) as results:
        assert len(results) == 2


@pytest.mark.parametrize(
    "content",
    [b"\n\n\n", b"hello\n", b"[]\n", b'{"settings": {}}\n', encode_line({"settings": None}), b"[" * 99_999 + b"\n"],
)
def test_what_is_no_journal_is_left(tmp_path: Path, content: bytes) -> None:
    journal = tmp_path / "out.jsonl.journal"
    journal.write_bytes(content)
    with pytest.raises(UserError, match=r"journal:1: damaged"), store(tmp_path / "out.jsonl"):
        pass
    assert journal.read_bytes() == content


def test_the_documented_commands_read_and_write_it(tmp_path: Path) -> None:
    journal = begun(tmp_path / "out.jsonl")
    read = re.search(r"`(cut [^`]*) OUT\.journal`", FORMATS.read_text(encoding="utf-8"))[1]
    write = re.search(r"^    python (-c '.*zlib.*')$", FORMATS.read_text(encoding="utf-8"), re.MULTILINE)[1]
    command = f"{read} {journal} | {sys.executable} {write}"
    made = subprocess.run(command, shell=True, capture_output=True, check=True).stdout
    assert made == journal.read_bytes()


def test_a_line_that_changes_while_the_run_goes_on_is_never_used(tmp_path: Path) -> None:
    with store(tmp_path / "out.jsonl") as results:
        results.add(*map(served, KEYS))
        whole = results.journal_path.read_bytes()
        results.journal_path.write_bytes(whole.replace(b"15 = 8", b"15 = 9").replace(b"boxed{0}", b"boxed{9}"))
        with pytest.raises(UserError, match=CHANGED):
            results.get(KEYS[0])
        with pytest.raises(UserError, match=CHANGED):
            results.write_results()
    assert not (tmp_path / "out.jsonl").exists()
    with store(tmp_path / "out.jsonl") as results:
        assert KEYS[0] not in results and len(results) == len(KEYS) - 1


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Nothing can be written beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_could_not_be_written_is_not_half_there(tmp_path: Path) -> None:
    with store(tmp_path / "out.jsonl") as results:
        results.add(served(KEYS[0]))
        before = results.journal_path.read_bytes()
        with (
            largest_file(len(before) + 40),
            pytest.raises(
                UserError, match=r"out\.jsonl\.journal: the journal of the run cannot be written .*larger files"
            ),
        ):
            results.add(served(KEYS[1]))
        assert results.journal_path.read_bytes() == before
        assert KEYS[1] not in results
        results.add(served(KEYS[2]))
        assert results.get(KEYS[2]) == served(KEYS[2])


def test_texts_that_look_like_lines_stay_texts(trial: JournalTrial) -> None:
    assert any(b"deadbeef {" in line for line in trial.journal.splitlines())
    assert trial.outcome(trial.journal) == "same"
