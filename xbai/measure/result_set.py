"""The result files that are measured together: found, read, and refused where they do not belong together."""

from __future__ import annotations

import glob
import logging
from collections.abc import Sequence
from pathlib import Path

from xbai.errors import UserError
from xbai.measure.graded import question_key
from xbai.results.lines import JOURNAL_SUFFIX, ResultLine, read_result_lines
from xbai.results.run_budget import RunBudget
from xbai.results.settings import differing_settings

logger = logging.getLogger(__name__)


def result_files(patterns: Sequence[str], option: str = "--result_paths") -> list[Path]:
    """The files that paths and globs name (in errors as `option`), each once, journals of unfinished runs left out.

    Raises:
        UserError: one of them names no file.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        paths = [Path(path) for path in sorted(glob.glob(pattern))]  # noqa: PTH207 (a pattern may be absolute)
        # A name may hold the characters of a glob.
        paths = paths or [Path(pattern)]
        results = [path for path in paths if path.is_file() and path.suffix != JOURNAL_SUFFIX]
        if not results:
            raise UserError(f"{option} {pattern}: no such file{_unfinished_hint(pattern)}")
        found.update(dict.fromkeys(results))
    return list(found)


def _unfinished_hint(pattern: str) -> str:
    journal = Path(pattern.removesuffix(JOURNAL_SUFFIX) + JOURNAL_SUFFIX)
    return f"; {journal} is an unfinished run, run the same inference again to finish it" if journal.exists() else ""


def read_lines(paths: Sequence[Path], task: str | None = None, with_budget: bool = False) -> list[ResultLine]:
    """All result lines of files that belong together, those without any candidate too.

    Files of one run in parts, or of several runs that differ in nothing but the seed, belong together; and files that
    all do not say how they were made.

    Args:
        with_budget: take those of which a rule chose how many candidates there are: then their number says something
            of the question, and statistics over candidates mean something else.

    Raises:
        UserError: a file is not a result file, was sampled with a budget, holds a sample of another one again, was made
            with other settings or for another task, or does not say how it was made while another does; or there is no
            candidate at all.
    """
    found = [(path, line) for path in paths for line in read_result_lines(path)]
    if not any(line.samples for _, line in found):
        raise UserError(f"{', '.join(map(str, paths))}: no candidates to measure")
    _check_settings(found, task, with_budget)
    _check_repeated(found)
    for path in paths:
        journal = path.with_name(path.name + JOURNAL_SUFFIX)
        if journal.exists():
            logger.warning("%s: an unfinished run adds to this file; what it holds so far is not counted", journal)
    return [line for _, line in found]


def _check_settings(found: Sequence[tuple[Path, ResultLine]], task: str | None, with_budget: bool) -> None:
    told = [(path, line.settings) for path, line in found if line.settings is not None]
    untold = [path for path, line in found if line.settings is None]
    if told and untold:
        # Neither whether they belong together can be told, nor which questions are the same: by place, or by text?
        raise UserError(
            f"{untold[0]} does not say how it was made, as files of XBai's own pipeline do not, and {told[0][0]} does: "
            "measure each alone"
        )
    for path, settings in told:
        if not with_budget and (budget := RunBudget.from_settings(settings)) is not None:
            raise UserError(f"{path}: sampled with {budget.options}; only xbai metric measures that")
        first_path, first = told[0]
        if task is not None and settings.get("task", task) != task:
            raise UserError(f"{path}: made for --task {settings['task']}, not {task}")
        differing = [name for name in differing_settings(first, settings) if name != "seed"]
        if differing:
            values = "; ".join(f"{name}={first.get(name)!r}, there {settings.get(name)!r}" for name in differing)
            raise UserError(f"{first_path} and {path} were made with different settings ({values}): measure each alone")


def _check_repeated(found: Sequence[tuple[Path, ResultLine]]) -> None:
    # With a seed, the sample of that number is the same sample wherever it stands.
    seen: dict[tuple, Path] = {}
    for path, line in found:
        seed = (line.settings or {}).get("seed")
        for sample in line.samples if seed is not None else ():
            key = (question_key(line), seed, sample.sample)
            if key in seen:
                raise UserError(
                    f"{path} holds sample {sample.sample} of question {line.index} again, after {seen[key]}"
                )
            seen[key] = path
