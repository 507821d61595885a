"""Download benchmarks and training sets from the Hub and write them in the layouts that this project reads.

    python data/prepare.py aime24 math500 [--out DIR]

Benchmarks become `NAME.jsonl`, training sets `NAME.parquet`; `make10` is made here and needs no network. The SHA-256
sums of all files written are kept in `SHA256SUMS.json` beside them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.progress import track

from xbai.benchmarks.base import Row
from xbai.benchmarks.ceval import SUBJECTS
from xbai.benchmarks.make10 import write_splits
from xbai.benchmarks.registry import get_benchmark
from xbai.errors import UserError, exit_on_user_error
from xbai.files import atomic_write

DATA_FOLDER = Path(__file__).parent
SUMS_FILE = "SHA256SUMS.json"
TRAINING_INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
NO_ANSWERS = ("", "proof", "notfound")
KEPT_FIELDS = ("id", "unique_id", "subject", "level")
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
    """Where a set comes from: a dataset on the Hub, the split taken, and its configurations (None: it has one)."""

    dataset: str
    split: str
    configurations: tuple[str | None, ...] = (None,)


BENCHMARK_SOURCES = {
    "aime24": HubSource("HuggingFaceH4/aime_2024", "train"),
    "aime25": HubSource("math-ai/aime25", "test"),
    "math500": HubSource("HuggingFaceH4/MATH-500", "test"),
    "gsm8k": HubSource("openai/gsm8k", "test", ("main",)),
    # The answers of its test split are not public.
    "ceval": HubSource("ceval/ceval-exam", "val", tuple(SUBJECTS)),
}
TRAINING_SOURCES = {
    "deepscaler": HubSource("agentica-org/DeepScaleR-Preview-Dataset", "train"),
    "numina-math": HubSource("AI-MO/NuminaMath-1.5", "train"),
    "openr1-math": HubSource("open-r1/OpenR1-Math-220k", "train", ("default",)),
}
NAMES = ("make10", *BENCHMARK_SOURCES, *TRAINING_SOURCES)

Download = Callable[[HubSource], Iterable[Row]]


def download(source: HubSource) -> Iterator[Row]:
    """The rows of a Hub dataset; of one in several configurations, each row names its own as `subject`.

    Raises:
        UserError: the Hub cannot be reached, or has no such dataset.
    """
    from datasets import load_dataset

    for configuration in source.configurations:
        try:
            rows = load_dataset(source.dataset, configuration, split=source.split)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"cannot download {source.dataset}: {reason}; this needs a network connection to the Hub "
                "(or its mirror: HF_ENDPOINT), only make10 is made without one"
            ) from error
        rows = rows.select_columns([name for name in rows.column_names if name in NEEDED_COLUMNS])
        for row in track(rows, description=f"{source.dataset} {configuration or ''}".strip(), total=len(rows)):
            yield {"subject": configuration, **row} if len(source.configurations) > 1 else row


def benchmark_rows(name: str, rows: Iterable[Row]) -> Iterator[Row]:
    """A benchmark's rows as its file holds them: `prompt` with the instruction, `answer`, and what identifies it."""
    benchmark = get_benchmark(name)
    for index, row in enumerate(rows):
        question = benchmark.question_from_row(index, row, f"{name}: row {index + 1}")
        kept = {field: row[field] for field in KEPT_FIELDS if row.get(field) is not None}
        yield {"prompt": benchmark.messages(question)[0]["content"], "answer": question.answer, **kept}


def training_rows(name: str, rows: Iterable[Row]) -> Iterator[Row]:
    """Training rows of the problems whose answer can be checked."""
    checkable = filter(is_checkable, rows)
    for index, row in enumerate(checkable):
        problem = row["problem"].strip()
        yield {
            "data_source": name,
            "prompt": [{"role": "user", "content": f"{problem} {TRAINING_INSTRUCTION}"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": {"target": str(row["answer"]).strip()}},
            "extra_info": {"index": index, "split": "train", "question": problem},
        }


def is_checkable(row: Row) -> bool:
    """Whether a row has an answer of its own: no proof, no multiple choice, not marked as invalid by its publisher."""
    answer = str(row.get("answer") if row.get("answer") is not None else "").strip().lower()
    return (
        bool(row.get("problem"))
        and answer not in NO_ANSWERS
        and row.get("question_type", "math-word-problem") == "math-word-problem"
        and row.get("problem_is_valid", "Yes") == "Yes"
        and row.get("solution_is_valid", "Yes") == "Yes"
    )


def write_jsonl(path: Path, rows: Iterable[Row]) -> int:
    """Write one JSON object a line; returns how many."""
    written = 0
    with atomic_write(path) as stream:
        for row in rows:
            stream.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            written += 1
    return written


def write_training_parquet(path: Path, rows: Iterable[Row]) -> int:
    """Write training rows without ever holding all of them; returns how many."""
    written, chunk = 0, []
    with atomic_write(path) as stream, pq.ParquetWriter(stream, TRAINING_SCHEMA) as writer:
        for row in rows:
            chunk.append(row)
            if len(chunk) == ROWS_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(chunk, TRAINING_SCHEMA))
                written, chunk = written + len(chunk), []
        writer.write_table(pa.Table.from_pylist(chunk, TRAINING_SCHEMA))
    return written + len(chunk)


def prepare(name: str, out: Path, fetch: Download = download) -> list[Path]:
    """Make the files of one set in `out` and record their sums; returns their paths."""
    if name == "make10":
        files = write_splits(out)
        paths = [files.sft, files.train, files.validation, files.test]
        origin: dict[str, Any] = {"source": "generated"}
    elif name in BENCHMARK_SOURCES:
        source, paths = BENCHMARK_SOURCES[name], [out / f"{name}.jsonl"]
        rows = write_jsonl(paths[0], benchmark_rows(name, fetch(source)))
        origin = {"source": f"{source.dataset} ({source.split})", "rows": rows}
    else:
        source, paths = TRAINING_SOURCES[name], [out / f"{name}.parquet"]
        rows = write_training_parquet(paths[0], training_rows(name, fetch(source)))
        origin = {"source": f"{source.dataset} ({source.split})", "rows": rows}
    record_sums(out, dict.fromkeys(paths, origin))
    return paths


def record_sums(out: Path, origins: dict[Path, dict[str, Any]]) -> None:
    """Add the SHA-256 sum and origin of each file to `SHA256SUMS.json`."""
    sums_path = out / SUMS_FILE
    sums = json.loads(sums_path.read_text()) if sums_path.exists() else {}
    for path, origin in origins.items():
        with path.open("rb") as stream:
            sums[path.name] = {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), **origin}
    with atomic_write(sums_path, "w") as stream:
        json.dump(dict(sorted(sums.items())), stream, indent=2)


def main(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help=f"what to prepare: {', '.join(NAMES)}")],
    out: Annotated[Path, typer.Option(help="folder for the files")] = DATA_FOLDER,
) -> None:
    """Download (or make) data sets and write them in the layouts that this project reads."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise UserError(f"unknown data set {', '.join(unknown)}; known are {', '.join(NAMES)}")
    for name in names:
        for path in prepare(name, out):
            typer.echo(f"wrote {path}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    exit_on_user_error(app)()
