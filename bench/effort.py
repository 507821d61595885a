"""What each reasoning effort costs and brings, on a finished quickstart's model behind `xbai serve`.

    python bench/effort.py outputs/quickstart outputs/quickstart_seed1

The first test problems of each folder are asked over `/v1/chat/completions`, by several clients at once for accuracy
and tokens, and some of them again by a lone client for the time that it waits: until the whole answer, and until the
first token of the answer that it streams. At medium and high the same is done with whole responses, where each
candidate answers and not the best one alone, and `test/inference.py --branch 32` answers with the same seeds.
The last line is one JSON object: means over the folders, and what each folder gave.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import httpx
import typer
from budget import SAMPLING
from http_load import running_service
from machine import ROOT, describe_machine, report, rounded
from tqdm import tqdm

from xbai.errors import exit_on_user_error
from xbai.grading.dispatch import answer_check
from xbai.infer.options import RunOptions
from xbai.infer.run import run
from xbai.measure.estimators import Estimate
from xbai.measure.metrics import report_files
from xbai.results.settings import request_seed

EFFORTS = ("none", "low", "medium", "high")
ARMS = {effort: {"reasoning_effort": effort} for effort in EFFORTS} | {
    f"{effort}_whole": {"reasoning_effort": effort, "answer_once": False} for effort in ("medium", "high")
}
BRANCH = 32
TIMEOUT_S = 3600.0

SERVE = (sys.executable, "-c", "from xbai.cli import app; app()", "serve", "--with_scores", "--max_pending", "4096")


@dataclass(frozen=True)
class Answered:
    """One question's answer: what it cost, and when it came."""

    is_right: bool
    tokens: int
    seconds: float
    seconds_to_first_answer_token: float


class Bench:
    """One quickstart's model and problems."""

    def __init__(self, quickstart: Path, folder: Path, problems: int, seed: int) -> None:
        lines = (quickstart / "data/make10_test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:problems]
        self.model, self.folder, self.seed = quickstart / "model", folder, seed
        self.problems = [json.loads(line) for line in lines]
        (folder / "problems.jsonl").write_text("".join(lines), encoding="utf-8")

    def run(self, clients: int, timed: int) -> dict[str, dict[str, float]]:
        """All arms."""
        found = {}
        with running_service([*SERVE, "--model_path", str(self.model)], self.folder / "serve.log") as service:
            for name, fields in ARMS.items():
                self.answers(service.url, fields, range(min(2, len(self.problems))), 1, f"{name}, warm-up")
                together = self.answers(service.url, fields, range(len(self.problems)), clients, name)
                alone = self.answers(service.url, fields, range(min(timed, len(self.problems))), 1, f"{name}, alone")
                accuracy = Estimate.over([float(one.is_right) for one in together])
                found[name] = {
                    "accuracy": 100 * accuracy.mean,
                    "accuracy_standard_error": 100 * accuracy.standard_error,
                    "tokens": fmean(one.tokens for one in together),
                    "seconds": fmean(one.seconds for one in alone),
                    "seconds_to_first_answer_token": fmean(one.seconds_to_first_answer_token for one in alone),
                }
            found[f"inference_{BRANCH}"] = self.inference(service.url)
        return found

    def answers(self, url: str, fields: dict[str, Any], questions: range, clients: int, name: str) -> list[Answered]:
        """Answers to the questions, in their order."""
        with httpx.Client(timeout=TIMEOUT_S) as client, ThreadPoolExecutor(clients) as pool:
            answers = pool.map(lambda question: self.ask(client, url, fields, question), questions)
            return list(tqdm(answers, total=len(questions), desc=name))

    def ask(self, client: httpx.Client, url: str, fields: dict[str, Any], question: int) -> Answered:
        """Stream the answer to one."""
        problem = self.problems[question]
        body = {
            "messages": [{"role": "user", "content": problem["prompt"]}],
            "seed": request_seed(self.seed, question, 0),
            "stream": True,
            "stream_options": {"include_usage": True},
            **SAMPLING,
            **fields,
        }
        content, first, usage = "", None, None
        started = time.monotonic()
        with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                usage = chunk["usage"] or usage
                for choice in chunk["choices"]:
                    if said := choice["delta"].get("content"):
                        first = first or time.monotonic() - started
                        content += said
        seconds = time.monotonic() - started
        is_right = answer_check("make10")(content, problem["answer"])
        return Answered(is_right, usage["completion_tokens"], seconds, first or seconds)

    def inference(self, url: str) -> dict[str, float]:
        """What `test/inference.py` and `test/compute_metric.py` say of the same questions and seeds."""
        path = str(self.folder / "inference.jsonl")
        options = RunOptions(
            task="make10",
            input_file=str(self.folder / "problems.jsonl"),
            output_file=path,
            model_dir=str(self.model),
            response_api_url=url,
            branch=BRANCH,
            response_num=BRANCH,
            seed=self.seed,
            **SAMPLING,
        )
        run(options)
        measured, questions = report_files("make10", [path])
        accuracy = measured.curves["best_of_n"][BRANCH]
        return {
            "accuracy": 100 * accuracy.mean,
            "accuracy_standard_error": 100 * accuracy.standard_error,
            "tokens": fmean(float(question.tokens.sum()) for question in questions),
        }


def mean_of(folders: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Means over the folders, and how many of whole responses' tokens it takes to answer once."""
    means: dict[str, Any] = {
        arm: {key: fmean(figures[arm][key] for figures in folders) for key in folders[0][arm]} for arm in folders[0]
    }
    ratio = fmean(means[effort]["tokens"] / means[f"{effort}_whole"]["tokens"] for effort in ("medium", "high"))
    return {**means, "answer_once_over_whole_tokens": ratio}


@exit_on_user_error
def main(
    quickstarts: Annotated[list[Path], typer.Argument(help="output folders of finished quickstarts, of several seeds")],
    problems: Annotated[int, typer.Option(min=1)] = 200,
    clients: Annotated[int, typer.Option(min=1, help="that ask at once, for accuracy and tokens")] = 16,
    timed: Annotated[int, typer.Option(min=1, help="problems that a lone client asks, for the seconds")] = 20,
    seed: Annotated[int, typer.Option(help="of the samples")] = 0,
    out: Annotated[Path, typer.Option(help="the JSON file to write")] = ROOT / "bench/results/effort.json",
) -> None:
    """Measure every folder's model."""
    found = {}
    for quickstart in quickstarts:
        with tempfile.TemporaryDirectory(prefix="effort_") as folder:
            found[str(quickstart.name)] = Bench(quickstart, Path(folder), problems, seed).run(clients, timed)
    settings = {"problems": problems, "clients": clients, "timed": timed, "seed": seed, **SAMPLING}
    result = {**mean_of(list(found.values())), "folders": found, "settings": settings, "machine": describe_machine()}
    report(rounded(result), out)


if __name__ == "__main__":
    typer.run(main)
