"""What the commands that measure results are asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True)
class MetricOptions:
    """What to measure, and where to write it; `-` is the terminal, which then shows no tables."""

    task: str
    """The benchmark, which knows how its answers are graded."""
    result_paths: tuple[str, ...]
    """Result files of one run: a path or a glob; may be repeated."""
    n: Annotated[int, typer.Option("--N", min=1)] = 1
    """Candidates among which the score chooses."""
    more_paths: Annotated[tuple[str, ...], typer.Argument(metavar="FILE")] = ()
    """More of them, as a shell expands a glob."""
    compare: tuple[str, ...] = ()
    """Results to compare with, question by question; a glob; may be repeated."""
    json_path: Annotated[Path | None, typer.Option("--json")] = None
    """Write all numbers here; - for the terminal, instead of the tables."""
    markdown_path: Annotated[Path | None, typer.Option("--markdown")] = None
    """Write the tables here; - for the terminal, likewise."""
    plot_path: Annotated[Path | None, typer.Option("--plot")] = None
    """Draw the figure here: .png, .pdf or .svg."""
    calibration: Path | None = None
    """Model folder (or file) of xbai calibrate: choose by score and log-prob too."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """Paths and globs of the result files."""
        return *self.result_paths, *self.more_paths


@dataclass(frozen=True)
class CalibrateOptions:
    """What to fit a calibration on, and of which model it is."""

    results: Annotated[tuple[str, ...], typer.Argument(metavar="RESULTS")]
    """Results of validation questions, with scores and log-probs; globs."""
    task: str
    """The benchmark, which knows how its answers are graded."""
    model_path: str
    """A Hugging Face model folder."""


@dataclass(frozen=True)
class ReplayOptions:
    """Which rules to replay on which samples, and where to write what they would have brought."""

    results: Annotated[tuple[str, ...], typer.Argument(metavar="RESULTS")]
    """Results of Best-of-N with step ends; globs."""
    task: str
    """The benchmark, which knows how its answers are graded."""
    budget: tuple[str, ...] = ()
    """A rule to replay as it is, such as stop:0.9/4; may be repeated."""
    n: Annotated[int, typer.Option("--n", min=1)] = 32
    """Most candidates of a question."""
    tolerance: Annotated[float, typer.Option(min=0)] = 0.5
    """Points of accuracy by which a rule may fall short of Best-of-N, a standard error allowed for."""
    calibration: Path | None = None
    """Model folder (or file) of xbai calibrate: chances for --budget; by default fitted on the other half."""
    json_path: Annotated[Path | None, typer.Option("--json")] = None
    """Write all numbers here; - for the terminal, instead of the tables."""
    markdown_path: Annotated[Path | None, typer.Option("--markdown")] = None
    """Write the tables here; - for the terminal, likewise."""
    plot_path: Annotated[Path | None, typer.Option("--plot")] = None
    """Draw accuracy against tokens here: .png, .pdf or .svg."""


@dataclass(frozen=True)
class SummaryOptions:
    """What to compare."""

    task: str
    """The benchmark, which knows how its answers are graded."""
    base_results: str
    """Results of the model before RL; a glob."""
    rl_results: str
    """Results of the model after RL; a glob."""
    output: Path
    """The JSON file to write."""
    held_out: str | None = None
    """Results of the model after RL on other kinds of questions."""
    held_out_base: str | None = None
    """Results of the model before RL on those."""
    calibration: Path | None = None
    """Of the model after RL, its folder or the file, by xbai calibrate: choose by score and log-prob too."""
    score_setting: Path | None = None
    """A JSON object that says how the score was trained."""
    plot_output: Annotated[Path | None, typer.Option("--plot")] = None
    """Also draw accuracy against N here."""
    seconds_total: Annotated[float | None, typer.Option(min=0)] = None
    """Time of the whole run."""


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise typer.BadParameter(f"{text}: whole numbers with commas between them") from None


@dataclass(frozen=True)
class FeatureOptions:
    """How features are made.

    Attributes:
        trust_remote_code: run the Python code that comes with the folder.
    """

    model_path: str
    """A Hugging Face model folder; a score head in it is not used."""
    task: str | None = None
    """The benchmark by which result files are graded."""
    layers: Annotated[tuple[int, ...] | None, typer.Option(parser=_layers, metavar="NUMBERS")] = None
    """Decoder layers from 0, as 8,16,22; by default the one that a head reads."""
    lang: str | None = None
    """Step rule: en or zh; by default the one that travels with the model."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16."""
    max_batch_tokens: Annotated[int | None, typer.Option(min=1)] = None
    """Most tokens of one forward pass; by default what suits the device."""
    trust_remote_code: bool = False


@dataclass(frozen=True)
class FeatureFilesOptions:
    """Of which files to keep features, and where."""

    files: Annotated[tuple[str, ...], typer.Argument(metavar="FILE")]
    """Graded responses: result files, or a training's rollouts; globs, folders."""
    output: Path
    """Folder for the features, a file for each of FILE."""
    how: FeatureOptions
