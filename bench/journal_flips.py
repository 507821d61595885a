"""Single bits of a journal flipped: what a run that goes on with it keeps, asks for again, loses or gets wrong.

    python bench/journal_flips.py [--flips 600] [--seed 0]

The journal is one that a run of 8 questions with 3 samples each left behind: with scores that came with their samples
and later ones, a refused sample, texts that look like lines of a journal, and settings that were known later. Every
flip is of another bit of the whole journal. A run then goes on with it: it keeps what it finds, the services give again
what it asks for again, and it writes its results. The last line is one JSON object:

    journal_flips    how many
    same             runs that kept everything
    asked_again      runs that asked for the sample or the score of the line that was hit, and for nothing else
    refused          runs that ended in one line for a line that says how the run was made; the journal is as it was
    lost             runs that asked for what stands in other lines, or ended for any other line that was hit
    silently_wrong   runs that kept a sample or wrote results that differ, or went on without a line of settings
    crashed          runs that ended in any other error
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from xbai.errors import UserError
from xbai.infer.store import ResultStore
from xbai.results.lines import REFUSED, Sample, SampleKey, StoredQuestion
from xbai.results.settings import RunSettings

QUESTIONS, SAMPLES = 8, 3
SETTINGS = RunSettings("make10", "m:1a", "q", 0.8, 0.95, -1, 1.05, 64, (), 0)
SERVICES = {"policy": "m:1a", "scorer": "s:2b", "lang": "en"}
TEXTS = (
    "7 + 8 - 1 - 1 - 5 = 8.\n\nWait.\n\n\\boxed{%d}",
    "数 %d。\n\n「できた」 \u2028 \x00 \x85",
    'deadbeef {"settings": {"task": "make10", "seed": %d}}\n',
    '{"question": 0, "sample": 0, "score": 0.5, "step_scores": null}\n%d',
    "",
)
REFUSED_KEY = (5, 2)
OUTCOMES = ("same", "asked_again", "refused", "lost", "silently_wrong", "crashed")


def keys() -> Iterator[SampleKey]:
    """Of all samples."""
    return ((question, sample) for question in range(QUESTIONS) for sample in range(SAMPLES))


def served(key: SampleKey) -> Sample:
    """What the services give for a sample, its score included."""
    question, sample = key
    if key == REFUSED_KEY:
        return Sample(question, sample, "", finish_reason=REFUSED, error="413: too long")
    number = question * SAMPLES + sample
    text = TEXTS[number % len(TEXTS)]
    steps = [number / 100, 0.5]
    return Sample(
        question, sample, text % number if text else text, "stop", number, number / 8, 0.25, steps, None, -0.5
    )


def unscored(key: SampleKey) -> Sample:
    """A sample whose score comes later."""
    return replace(served(key), score=None, step_scores=None)


def is_right(kept: dict[SampleKey, Sample]) -> bool:
    """Whether every sample is what was served, but for scores that are asked for again."""
    return all(sample in (served(key), unscored(key)) for key, sample in kept.items())


def is_unscored(sample: Sample) -> bool:
    """Whether its score is asked for."""
    return sample.score is None and sample.finish_reason != REFUSED


class JournalTrial:
    """A journal, and what runs make of it once it is damaged.

    Args:
        folder: an empty one, to work in.

    Attributes:
        journal: its bytes.
        results: of the result file that is made of it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "out.jsonl"
        self._questions = [StoredQuestion(i, f"<p{i}>", str(i), {"question": f"q{i}"}) for i in range(QUESTIONS)]
        with self._store() as store:
            self._journal_path = store.journal_path
            store.record(policy=SERVICES["policy"])
            for key in keys():
                store.add(unscored(key) if sum(key) % 2 else served(key))
            store.record(**SERVICES)
            for key in store.unscored():
                store.add_score(key, served(key).score, served(key).step_scores)
        self.journal = self._journal_path.read_bytes()
        lines = self.journal.splitlines(keepends=True)
        self._records = {line: json.loads(line[line.index(b"{") :]) for line in lines}
        with self._store() as store:
            store.write_results()
        self.results = self.path.read_bytes()

    def outcome(self, damaged: bytes) -> str:
        """Which of `OUTCOMES` a run comes to that finds this journal."""
        self.path.unlink(missing_ok=True)
        self._journal_path.write_bytes(damaged)
        hit = [record for line, record in self._records.items() if line not in damaged]
        try:
            kept = self._go_on()
        except UserError:
            is_untouched = self._journal_path.read_bytes() == damaged and not self.path.exists()
            return "refused" if is_untouched and any("settings" in record for record in hit) else "lost"
        except Exception:
            logging.exception("a run on the damaged journal failed")
            return "crashed"
        if self._lacks_settings(damaged) or self.path.read_bytes() != self.results or not is_right(kept):
            return "silently_wrong"
        again = {key for key in keys() if key not in kept or is_unscored(kept[key])}
        if not again <= {(record.get("question"), record.get("sample")) for record in hit}:
            return "lost"
        return "asked_again" if again else "same"

    def _go_on(self) -> dict[SampleKey, Sample]:
        """Do as a run does, to the end; returns what it kept."""
        with self._store() as store:
            kept = {key: store.get(key) for key in keys() if key in store}
            store.record(**SERVICES)
            for key in keys():
                if key not in kept:
                    store.add(served(key))
            for key in store.unscored():
                store.add_score(key, served(key).score, served(key).step_scores)
            store.write_results()
        return kept

    def _lacks_settings(self, damaged: bytes) -> bool:
        objects = (line[line.index(b"{") : -1] for line, record in self._records.items() if "settings" in record)
        return any(text not in damaged for text in objects)

    def _store(self) -> ResultStore:
        return ResultStore(self.path, SETTINGS, self._questions)


def flip_bits(flips: int, seed: int = 0) -> dict[str, int]:
    """Flip so many different bits of a journal, one at a time; returns how often each outcome came, by its name."""
    folder = Path(tempfile.mkdtemp(prefix="journal_flips_"))
    try:
        trial = JournalTrial(folder)
        found = Counter(
            trial.outcome(flipped(trial.journal, bit))
            for bit in random.Random(seed).sample(range(8 * len(trial.journal)), flips)
        )
    finally:
        shutil.rmtree(folder)
    return {"journal_flips": flips} | {name: found[name] for name in OUTCOMES}


def flipped(content: bytes, bit: int) -> bytes:
    """With one bit the other way."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def main(
    flips: Annotated[int, typer.Option(min=1, help="how many bits")] = 600,
    seed: Annotated[int, typer.Option(help="of the choice of bits")] = 0,
) -> None:
    """Flip bits of a journal."""
    # A line a damaged journal is what a run says; here it would be hundreds.
    logging.getLogger("xbai").setLevel(logging.ERROR)
    typer.echo(json.dumps(flip_bits(flips, seed)))


if __name__ == "__main__":
    typer.run(main)
