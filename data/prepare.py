"""Download benchmarks and training sets from the Hub and write them in the layouts that this project reads.

    python data/prepare.py aime24 math500 [--out DIR]
    python data/prepare.py livecodebench --release release_v5 --start_date 2024-08-01

Benchmarks become `NAME.jsonl`, and those of mathematics `NAME.parquet` too, for validation during training; training
sets become `NAME.parquet`; `make10` is made here and needs no network. The SHA-256 sum and the revision of every file
are kept in `SHA256SUMS.json` beside it: what is there already is checked and not made again, and what is made again is
of the same revision. Files once downloaded stay in the Hub's cache, so that an interrupted run goes on with the next.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.progress import track, wrap_file

from xbai.benchmarks.base import Benchmark, MathBenchmark, Question, Row
from xbai.benchmarks.ceval import SUBJECTS
from xbai.benchmarks.livecodebench import DEFAULT_RELEASE, RELEASES, LiveCodeBench
from xbai.benchmarks.make10 import write_splits
from xbai.benchmarks.registry import get_benchmark
from xbai.benchmarks.rows import training_row, write_jsonl
from xbai.errors import UserError, exit_on_user_error
from xbai.files import atomic_write, check_writable
from xbai.grading.code_tests import read_code_tests

DATA_FOLDER = Path(__file__).parent
SUMS_FILE = "SHA256SUMS.json"
TESTS_FOLDER = "livecodebench.tests"
TRAINING_INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
NO_ANSWERS = ("", "proof", "notfound")
KEPT_FIELDS = (
    *("id", "unique_id", "subject", "level"),
    *("question_id", "platform", "difficulty", "contest_date", "release"),
)
NEEDED_COLUMNS = (
    *("problem", "question", "answer", *KEPT_FIELDS, "A", "B", "C", "D"),
    *("question_type", "problem_is_valid", "solution_is_valid"),
)
ROWS_AT_ONCE = 10_000

_MESSAGE = pa.struct({"role": pa.string(), "content": pa.string()})
_GROUND_TRUTH = pa.struct({"target": pa.string()})
TRAINING_SCHEMA = pa.schema(
    {
        "data_source": pa.string(),
        "prompt": pa.list_(_MESSAGE),
        "ability": pa.string(),
        "reward_model": pa.struct({"style": pa.string(), "ground_truth": _GROUND_TRUTH}),
        "extra_info": pa.struct({"index": pa.int64(), "split": pa.string(), "question": pa.string()}),
    }
)


@dataclass(frozen=True)
class HubSource:
    """Where a set comes from."""

    dataset: str
    """Its name on the Hub."""
    split: str
    configurations: tuple[str | None, ...] = (None,)
    """Those taken, None for the only one."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Read as they are, where the Hub cannot split the dataset; each row says as `release` which it is from."""
    benchmark: str | None = None
    """Whose layout it becomes, where that is not the name of the set."""


BENCHMARK_SOURCES = {
    "aime24": HubSource("HuggingFaceH4/aime_2024", "train"),
    "aime25": HubSource("math-ai/aime25", "test"),
    "math500": HubSource("HuggingFaceH4/MATH-500", "test"),
    "gsm8k": HubSource("openai/gsm8k", "test", ("main",)),
    "ceval": HubSource("ceval/ceval-exam", "val", tuple(SUBJECTS)),
    # Its answers are not public.
    "ceval-test": HubSource("ceval/ceval-exam", "test", tuple(SUBJECTS), benchmark="ceval"),
    "livecodebench": HubSource(
        "livecodebench/code_generation_lite",
        "test",
        files={release: f"test{number if number > 1 else ''}.jsonl" for number, release in enumerate(RELEASES, 1)},
    ),
}
TRAINING_SOURCES = {
    "deepscaler": HubSource("agentica-org/DeepScaleR-Preview-Dataset", "train"),
    "numina-math": HubSource("AI-MO/NuminaMath-1.5", "train"),
    "openr1-math": HubSource("open-r1/OpenR1-Math-220k", "train", ("default",)),
}
SELECTORS = ("release", "start_date", "end_date")
NAMES = ("make10", *BENCHMARK_SOURCES, *TRAINING_SOURCES)

Selection = dict[str, str]
"""The part of a benchmark that is taken, by `SELECTORS`; of those that can be cut, which is LiveCodeBench alone."""


@contextmanager
def hub_errors(dataset: str) -> Iterator[None]:
    """Whatever goes wrong between here and the Hub as one line."""
    try:
        yield
    except Exception as error:
        # Its clients raise the errors of the HTTP libraries below them, which change from version to version.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
        raise UserError(
            f"cannot download {dataset}: {reason}; this needs a network connection to the Hub "
            "(or its mirror: HF_ENDPOINT), only make10 is made without one"
        ) from error


def revision_of(source: HubSource) -> str:
    """The commit that the dataset is at."""
    from huggingface_hub import HfApi

    with hub_errors(source.dataset):
        return HfApi().dataset_info(source.dataset).sha


def download(source: HubSource, revision: str) -> Iterator[Row]:
    """The rows of a Hub dataset; of one in several configurations, each row names its own as `subject`.

    Raises:
        UserError: the Hub cannot be reached, or has no such dataset; `datasets` is not installed.
    """
    if source.files:
        yield from _download_files(source, revision)
        return
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise UserError(f"{source.dataset} is read with the package {error.name}: pip install -e '.[data]'") from None

    for configuration in source.configurations:
        with hub_errors(source.dataset):
            rows = load_dataset(source.dataset, configuration, split=source.split, revision=revision)
        rows = rows.select_columns([name for name in rows.column_names if name in NEEDED_COLUMNS])
        for row in track(rows, description=f"{source.dataset} {configuration or ''}".strip(), total=len(rows)):
            yield {"subject": configuration, **row} if len(source.configurations) > 1 else row


def _download_files(source: HubSource, revision: str) -> Iterator[Row]:
    from huggingface_hub import hf_hub_download

    for release, name in source.files.items():
        with hub_errors(source.dataset):
            path = Path(hf_hub_download(source.dataset, name, repo_type="dataset", revision=revision))
        with (
            path.open("rb") as stream,
            wrap_file(stream, path.stat().st_size, description=f"{source.dataset} {name}") as lines,
        ):
            for line in lines:
                yield {"release": release, **json.loads(line)}


def benchmark_rows(name: str, rows: Iterable[Row]) -> Iterator[Row]:
    """A benchmark's rows as its file holds them: `prompt` with the instruction, `answer`, and what identifies it."""
    benchmark = get_benchmark(name)
    for index, row in enumerate(rows):
        yield _file_row(benchmark, benchmark.question_from_row(index, row, f"{name}: row {index + 1}"), row)


def livecodebench_rows(rows: Iterable[Row], selection: Selection, out: Path) -> Iterator[Row]:
    """Rows of the problems selected, whose tests become a file each: some have megabytes of them."""
    benchmark = LiveCodeBench(**selection)
    for index, row in enumerate(rows):
        place = f"livecodebench: row {index + 1}"
        question = benchmark.question_from_row(index, row, place)
        if not benchmark.selects(question, place):
            continue
        try:
            tests = read_code_tests(question.answer).to_json().encode()
        except ValueError as error:
            raise UserError(f"{place}: the tests cannot be read: {error}") from error
        digest = hashlib.sha256(tests).hexdigest()
        file = f"{TESTS_FOLDER}/{digest[:16]}.json.gz"
        with atomic_write(out / file) as stream:
            stream.write(gzip.compress(tests, mtime=0))
        yield _file_row(benchmark, replace(question, answer=json.dumps({"file": file, "sha256": digest})), row)


def _file_row(benchmark: Benchmark, question: Question, row: Row) -> Row:
    kept = {field: row[field] for field in KEPT_FIELDS if row.get(field) is not None}
    return {"prompt": benchmark.messages(question)[0]["content"], "answer": question.answer, **kept}


def training_rows(name: str, rows: Iterable[Row]) -> Iterator[Row]:
    """Training rows of the problems whose answer can be checked."""
    for index, row in enumerate(filter(is_checkable, rows)):
        problem = row["problem"].strip()
        yield _math_row(name, f"{problem} {TRAINING_INSTRUCTION}", str(row["answer"]).strip(), "train", index, problem)


def validation_rows(benchmark: MathBenchmark, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows of a benchmark's file in the layout of training data."""
    for index, row in enumerate(rows):
        yield _math_row(benchmark.data_source, row["prompt"], row["answer"], "validation", index, row["prompt"])


def _math_row(data_source: str, prompt: str, answer: Any, split: str, index: int, question: str) -> Row:
    messages, truth = [{"role": "user", "content": prompt}], {"target": str(answer)}
    return training_row(data_source, messages, truth, "math", split=split, index=index, question=question)


def is_checkable(row: Row) -> bool:
    """Whether a row has an answer of its own: no proof, no multiple choice, not marked as invalid by its publisher."""
    answer = str(row.get("answer") if row.get("answer") is not None else "").strip().lower()
    return (
        bool(row.get("problem"))
        and answer not in NO_ANSWERS
        and row.get("question_type") in (None, "math-word-problem")
        and row.get("problem_is_valid") in (None, "Yes")
        and row.get("solution_is_valid") in (None, "Yes")
    )


def write_training_parquet(path: Path, rows: Iterable[Row]) -> int:
    """Write training rows without ever holding all of them; returns how many."""
    rows, written = iter(rows), 0
    with atomic_write(path) as stream, pq.ParquetWriter(stream, TRAINING_SCHEMA) as writer:
        while chunk := list(islice(rows, ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(chunk, TRAINING_SCHEMA))
            written += len(chunk)
    return written


def prepare(name: str, out: Path, selection: Selection) -> list[Path]:
    """Make the files of one set in `out` and record their sums; returns their paths.

    Raises:
        UserError: the Hub cannot be reached, or a file of that name is there that this did not make.
    """
    check_writable(out / SUMS_FILE)
    if name == "make10":
        paths = list(write_splits(out).values())
        record_sums(out, paths, {"set": name, "source": "generated"})
        return paths
    source = BENCHMARK_SOURCES.get(name) or TRAINING_SOURCES[name]
    benchmark = get_benchmark(source.benchmark or name) if name in BENCHMARK_SOURCES else None
    paths = [out / f"{name}.jsonl"] if benchmark else []
    if benchmark is None or isinstance(benchmark, MathBenchmark):
        paths.append(out / f"{name}.parquet")
    for path in paths:
        if path.exists() and path.name not in read_sums(out):
            raise UserError(f"{path} exists, and is not listed in {SUMS_FILE}: remove it, or choose another --out")
    if source.files:
        wanted = RELEASES.index(selection.get("release", DEFAULT_RELEASE)) + 1
        source = replace(source, files=dict(list(source.files.items())[:wanted]))
    revision = read_sums(out).get(paths[0].name, {}).get("revision") or revision_of(source)
    rows = download(source, revision)
    if name == "livecodebench":
        written = write_jsonl(paths[0], livecodebench_rows(rows, selection, out), ensure_ascii=False)
    elif benchmark is not None:
        file_rows = list(benchmark_rows(benchmark.name, rows))
        written = write_jsonl(paths[0], file_rows, ensure_ascii=False)
        if isinstance(benchmark, MathBenchmark):
            write_training_parquet(paths[1], validation_rows(benchmark, file_rows))
    else:
        written = write_training_parquet(paths[0], training_rows(name, rows))
    origin = {"set": name, "source": f"{source.dataset} ({source.split})", "revision": revision, "rows": written}
    record_sums(out, paths, origin | selection)
    return paths


def is_prepared(name: str, out: Path, selection: Selection) -> bool:
    """Whether the files of a set are there already, as they were made.

    Raises:
        UserError: one of them has changed since.
    """
    entries = {file: entry for file, entry in read_sums(out).items() if entry.get("set") == name}
    for file, entry in entries.items():
        if not (out / file).exists() or {key: entry[key] for key in SELECTORS if key in entry} != selection:
            return False
        if _sum_of(out / file) != entry["sha256"]:
            raise UserError(
                f"{out / file} has changed since it was prepared (see {SUMS_FILE}): remove it to make it anew"
            )
        if name == "livecodebench" and not _has_tests(out / file):
            return False
    return bool(entries)


def _has_tests(path: Path) -> bool:
    with path.open(encoding="utf-8") as stream:
        return all((path.parent / json.loads(json.loads(line)["answer"])["file"]).is_file() for line in stream)


def read_sums(out: Path) -> dict[str, dict[str, Any]]:
    """What `SHA256SUMS.json` says of each file."""
    path = out / SUMS_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); remove it and the files that are to be made anew") from None


def record_sums(out: Path, paths: Iterable[Path], origin: dict[str, Any]) -> None:
    """Add the SHA-256 sum and origin of each file to `SHA256SUMS.json`."""
    sums = read_sums(out) | {path.name: {"sha256": _sum_of(path), **origin} for path in paths}
    with atomic_write(out / SUMS_FILE, "w") as stream:
        json.dump(dict(sorted(sums.items())), stream, indent=2)


def _sum_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help=f"what to prepare: {', '.join(NAMES)}")],
    out: Annotated[Path, typer.Option(help="folder for the files")] = DATA_FOLDER,
    release: Annotated[
        str | None, typer.Option("--release", help=f"LiveCodeBench: {', '.join(RELEASES)} (default {DEFAULT_RELEASE})")
    ] = None,
    start_date: Annotated[
        str | None, typer.Option("--start_date", help="LiveCodeBench: contests from this day on, as YYYY-MM-DD")
    ] = None,
    end_date: Annotated[
        str | None, typer.Option("--end_date", help="LiveCodeBench: contests up to this day, itself included")
    ] = None,
) -> None:
    """Download (or make) data sets and write them in the layouts that this project reads."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise UserError(f"unknown data set {', '.join(unknown)}; known are {', '.join(NAMES)}")
    given = zip(SELECTORS, (release, start_date, end_date), strict=True)
    selection = {key: value for key, value in given if value is not None}
    # Says what is wrong with it before anything is downloaded.
    LiveCodeBench(**selection)
    if selection and "livecodebench" not in names:
        raise UserError("--release, --start_date and --end_date select from livecodebench, which is not asked for")
    for name in names:
        its_selection = selection if name == "livecodebench" else {}
        if is_prepared(name, out, its_selection):
            typer.echo(f"{name} is there already, and its checksums are right")
            continue
        for path in prepare(name, out, its_selection):
            typer.echo(f"wrote {path}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    exit_on_user_error(app)()
