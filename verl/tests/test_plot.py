"""The figure of a training, and the command that draws it."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from verl.trainer.plot import plot_training
from xbai import cli
from xbai.errors import UserError

TRAINING = EntryPoint("training", "verl.trainer.plot:command", cli.PLOTS)


def write(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    """Of a training that was killed while it wrote a line."""
    records = [{"step": i, "reward/pass_rate": i / 40, "score/auc": float("nan") if i == 3 else 0.9} for i in range(40)]
    path = write(tmp_path / "metrics.jsonl", *records)
    with path.open("a", encoding="utf-8") as stream:
        stream.write('{"step": 40, "rew')
    return path


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Those that are written."""
    found: list[Figure] = []
    save = Figure.savefig

    def watched(figure: Figure, *arguments: object, **options: object) -> None:
        found.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", watched)
    return found


def titles(figure: Figure) -> list[str]:
    return [axis.get_title(loc="left") for axis in figure.axes if axis.get_visible()]


def test_panels_of_what_was_logged_are_drawn(metrics: Path, tmp_path: Path, figures: list[Figure]) -> None:
    plot_training([metrics], tmp_path / "training.png")
    assert titles(figures[0]) == ["Pass rate", "Score AUC"]
    pixels = matplotlib.image.imread(tmp_path / "training.png")[..., :3]
    assert 0.02 < float((pixels < 0.98).any(-1).mean()) < 0.6


def test_runs_are_compared_by_colour(metrics: Path, tmp_path: Path, figures: list[Figure]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write(
        other / "metrics.jsonl",
        {"step": 1, "val/pass@1": 0.5, "reward/pass_rate": 0.25},
        {"step": 2, "val/pass@1": 0.75},
    )
    plot_training([metrics, other], tmp_path / "both.png")
    (figure,) = figures
    assert titles(figure) == [
        *("Pass rate\ntraining samples", "Pass rate\nvalidation pass@1", "Score AUC\ntraining, all samples"),
    ]
    (legend,) = figure.legends
    colours = {text.get_text(): line.get_color() for text, line in zip(legend.get_texts(), legend.get_lines())}
    assert list(colours) == [tmp_path.name, "other"]
    drawn = [{line.get_color() for line in axis.lines} for axis in figure.axes]
    assert drawn == [set(colours.values()), {colours["other"]}, {colours[tmp_path.name]}]
    (passed,) = figure.axes[1].lines
    assert passed.get_ydata().tolist() == [0.5, 0.75]


def test_runs_that_cannot_be_told_apart_are_said(metrics: Path, tmp_path: Path, figures: list[Figure]) -> None:
    same = write(tmp_path / "copy.jsonl", {"step": 1, "reward/pass_rate": 0.5})
    plot_training([metrics, same], tmp_path / "both.png")
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [str(metrics), str(same)]
    with pytest.raises(UserError, match=r"^--metrics_file: 7 runs are too many to tell apart; give at most 6$"):
        plot_training([metrics] * 7, tmp_path / "both.png")


def test_figures_without_data_say_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the training curves"):
        plot_training([write(tmp_path / "m.jsonl", {"step": 1, "other": 2.0})], tmp_path / "x.png")
    with pytest.raises(UserError, match="no such file"):
        plot_training([tmp_path / "none.jsonl"], tmp_path / "x.png")
    (tmp_path / "bad.jsonl").write_text('{"step": \n{"step": 2}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"bad\.jsonl:1"):
        plot_training([tmp_path / "bad.jsonl"], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_the_command_is_found_where_the_trainer_is_installed(
    metrics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["plot", "training", "--metrics_file", str(metrics), "--output", str(tmp_path / "a.svg")]
    monkeypatch.setattr(cli, "entry_points", lambda group: EntryPoints([TRAINING]))
    done = CliRunner().invoke(cli.app, arguments)
    assert (done.exit_code, done.output) == (0, f"wrote {tmp_path / 'a.svg'}\n")
    assert "--metrics_file" in CliRunner().invoke(cli.app, ["plot", "training", "--help"]).output
    done = CliRunner().invoke(cli.app, ["plot", "results"])
    assert (done.exit_code, done.stderr) == (
        2,
        "error: plot 'results': known are training, before all options; "
        "metric --plot and summary --plot draw results\n",
    )
    monkeypatch.setattr(cli, "entry_points", lambda group: EntryPoints())
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2
    assert "none, as the trainer is not installed (pip install -e verl, again where it was before)" in done.stderr
