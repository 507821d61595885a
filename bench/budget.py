"""Budgets against a fixed number of candidates, live, on a finished quickstart's model.

    python bench/budget.py outputs/quickstart outputs/quickstart_seed1

Of each folder's 400 test problems the last 200 are for fitting: 32 samples of each, by which the score is calibrated
and `xbai replay` chooses the cheapest rule `stop` by score that is no worse. The first 200 then are answered by the
same service and with the same seed: by Best-of-8, Best-of-32, and each of both with the rule that was fitted for it.
The last line is one JSON object: accuracy and tokens a question of all four, means over the folders, and the seconds
that each took; what replay foretells for the same problems, and what each folder gave, stand beside them.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from http_load import running_service
from machine import ROOT, describe_machine, report, rounded

from xbai.errors import UserError, exit_on_user_error
from xbai.infer.options import RunOptions
from xbai.infer.run import run
from xbai.measure.budget_report import budget_of_files, report_budget
from xbai.measure.calibrate import run_calibrate
from xbai.measure.estimators import Estimate
from xbai.measure.metrics import report_files
from xbai.measure.options import CalibrateOptions, ReplayOptions
from xbai.measure.replay_command import run_replay

SIZES = (8, 32)
SAMPLING = {"temperature": 0.7, "top_p": 1.0, "repetition_penalty": 1.0, "max_tokens": 256}
"""As in scripts/quickstart.sh."""
MAX_IN_FLIGHT = 256
"""Requests: waves of one candidate leave the engine idle unless there are as many as it has places."""

SERVE = (sys.executable, "-c", "from xbai.cli import app; app()", "serve-policy", "--with_scores")


class Bench:
    """One quickstart's model and problems, and a folder for what is measured on them."""

    def __init__(self, quickstart: Path, folder: Path, problems: int, seed: int) -> None:
        test = (quickstart / "data/make10_test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        if len(test) < 2 * problems:
            raise UserError(f"{quickstart}: {len(test)} test problems, of which {problems} are for fitting")
        self.folder, self.seed = folder, seed
        self.model = folder / "model"
        # The calibration is to lie beside it.
        shutil.copytree(quickstart / "model", self.model)
        for name, part in (("fit", test[-problems:]), ("live", test[:problems])):
            (folder / f"{name}_problems.jsonl").write_text("".join(part), encoding="utf-8")

    def infer(self, url: str, problems: str, name: str, size: int, budget: str | None = None) -> float:
        """Answer the problems; returns the seconds."""
        options = RunOptions(
            task="make10",
            input_file=str(self.folder / f"{problems}_problems.jsonl"),
            output_file=str(self.folder / f"{name}.jsonl"),
            model_dir=str(self.model),
            response_api_url=url,
            branch=size,
            response_num=size,
            max_in_flight=MAX_IN_FLIGHT,
            seed=self.seed,
            budget=budget,
            **SAMPLING,
        )
        started = time.monotonic()
        run(options)
        return time.monotonic() - started

    def fit(self, url: str) -> dict[int, str]:
        """Calibrate the score, and choose a rule for each size, on problems of their own."""
        self.infer(url, "fit", "fit", max(SIZES))
        results = (str(self.folder / "fit.jsonl"),)
        run_calibrate(CalibrateOptions(results, "make10", str(self.model)))
        found = self.replay(ReplayOptions(results, "make10"))["fitted"]
        return {size: found[str(size)]["stop"]["score"]["rule"] for size in SIZES}

    def replay(self, options: ReplayOptions) -> dict[str, Any]:
        """What `xbai replay` finds."""
        path = self.folder / "replay.json"
        run_replay(replace(options, json_path=path))
        return json.loads(path.read_text(encoding="utf-8"))

    def run(self) -> dict[str, Any]:
        """All four arms, and what replay foretells of the two with a rule."""
        figures: dict[str, Any] = {}
        command = [*SERVE, "--model_path", str(self.model), "--max_pending", str(MAX_IN_FLIGHT * max(SIZES))]
        with running_service(command, self.folder / "policy.log") as policy:
            rules = self.fit(policy.url)
            for size in SIZES:
                for name, rule in ((f"best_of_{size}", None), (f"budget_{size}", rules[size])):
                    seconds = self.infer(policy.url, "live", name, size, rule)
                    figures[name] = {**self.measured(name, size), "seconds": seconds}
        for size, rule in rules.items():
            figures[f"budget_{size}"] |= {"rule": rule, "replayed": self.replayed(rule, size)}
        return figures

    def measured(self, name: str, size: int) -> dict[str, float]:
        """Accuracy of the choice among `size` candidates at most, and tokens a question, with standard errors."""
        patterns = [str(self.folder / f"{name}.jsonl")]
        if (budget := budget_of_files(patterns)) is not None:
            found = report_budget("make10", patterns, budget)
            return figures_of(found.accuracy, found.tokens)
        report, questions = report_files("make10", patterns)
        tokens = Estimate.over([float(question.tokens.sum()) for question in questions])
        return figures_of(report.curves["best_of_n"][size], tokens)

    def replayed(self, rule: str, size: int) -> dict[str, float]:
        """The same figures by replay, on the plain samples of the live problems."""
        results = (str(self.folder / f"best_of_{max(SIZES)}.jsonl"),)
        (found,) = self.replay(ReplayOptions(results, "make10", (rule,), size, calibration=self.model))["budget"]
        return figures_of(*(Estimate(**found["point"][name]) for name in ("accuracy", "tokens")))


def figures_of(accuracy: Estimate, tokens: Estimate) -> dict[str, float]:
    """Means and standard errors over questions."""
    return {
        "accuracy": accuracy.mean,
        "accuracy_standard_error": accuracy.standard_error,
        "tokens": tokens.mean,
        "tokens_standard_error": tokens.standard_error,
    }


def mean_of(folders: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the folders."""
    arms = [name for size in SIZES for name in (f"best_of_{size}", f"budget_{size}")]
    means = {
        name: {key: fmean(figures[name][key] for figures in folders) for key in ("accuracy", "tokens")} for name in arms
    }
    return {**means, "seconds": {name: fmean(figures[name]["seconds"] for figures in folders) for name in arms}}


@exit_on_user_error
def main(
    quickstarts: Annotated[list[Path], typer.Argument(help="output folders of finished quickstarts, of several seeds")],
    problems: Annotated[int, typer.Option(min=1, help="to fit on, and as many others to answer")] = 200,
    seed: Annotated[int, typer.Option(help="of the samples")] = 0,
    keep: Annotated[Path | None, typer.Option(help="leave result files here")] = None,
    out: Annotated[Path, typer.Option(help="the JSON file to write")] = ROOT / "bench/results/budget.json",
) -> None:
    """Measure every folder's model."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="budget_") as temporary:
        for quickstart in quickstarts:
            folder = (keep or Path(temporary)) / quickstart.name
            folder.mkdir(parents=True)
            found[quickstart.name] = Bench(quickstart, folder, problems, seed).run()
    settings = {"problems": problems, "seed": seed, **SAMPLING}
    result = {**mean_of(list(found.values())), "folders": found, "settings": settings, "machine": describe_machine()}
    report(rounded(result), out)


if __name__ == "__main__":
    typer.run(main)
