"""The README's table of results, from the output folders of finished quickstarts.

    python bench/quickstart_table.py outputs/quickstart outputs/seed1

Each folder becomes `bench/results/quickstart_seedN.json`: accuracies with standard errors over questions, AUC, seconds
of each stage, commit and this machine. Prints the Markdown table over all such files, whose numbers the READMEs hold
(a test compares them); without folders it only prints.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from machine import ROOT, describe_machine

from xbai.errors import UserError, exit_on_user_error
from xbai.files import write_json
from xbai.measure.metrics import json_ready, report_files

RESULTS = ROOT / "bench/results"
MODELS = {"base": "before RL", "rl": "after RL"}
COUNTS = {"best_of_n": (2, 8, 32), "majority": (8, 32), "oracle": (8, 32)}
COLUMNS = {
    "pass@1": ("pass_at_1",),
    "Best-of-2": ("best_of_n", "2"),
    "Best-of-8": ("best_of_n", "8"),
    "Best-of-32": ("best_of_n", "32"),
    "maj@8": ("majority", "8"),
    "oracle@8": ("oracle", "8"),
    "AUC within a prompt": ("within_prompt_auc",),
    "AUC": ("auc",),
}
SAMPLING = ("temperature", "top_p", "repetition_penalty", "max_tokens")


def record_of(folder: Path) -> dict[str, Any]:
    """The figures of one quickstart.

    Raises:
        UserError: it is not finished.
    """
    if not (folder / "stages/report").is_file():
        raise UserError(f"{folder}: not a finished quickstart; run scripts/quickstart.sh to its end first")
    settings = dict(
        entry.split("=", 1) for entry in (folder / "settings").read_text(encoding="utf-8").split(" ", 3)[:3]
    )
    commit = folder / "commit"
    reports = {name: report_files("make10", [str(folder / f"results/{name}.jsonl")])[0] for name in MODELS}
    rl = reports["rl"]
    return {
        "benchmark": "quickstart",
        "seed": int(settings["SEED"]),
        "settings": (folder / "settings").read_text(encoding="utf-8").strip(),
        "commit": commit.read_text(encoding="utf-8").strip() if commit.is_file() else None,
        "problems": rl.questions,
        "samples": rl.samples,
        "sampling": {name: (rl.settings or {})[name] for name in SAMPLING},
        "models": {name: figures_of(json_ready(report)) for name, report in reports.items()},
        "stage_seconds": {
            path.name: int(path.read_text(encoding="utf-8")) for path in sorted((folder / "stages").iterdir())
        },
        "machine": {name: value for name, value in describe_machine().items() if name != "threads"},
    }


def figures_of(report: dict[str, Any]) -> dict[str, Any]:
    """One row: accuracies with their standard errors, and how well the scores tell."""
    curves = {
        strategy: {str(n): report["curves"][strategy][str(n)] for n in counts} for strategy, counts in COUNTS.items()
    }
    return {"pass_at_1": report["mean_at_1"], **curves} | {key: report[key] for key in ("auc", "within_prompt_auc")}


def to_markdown(records: list[dict[str, Any]]) -> str:
    """Percentages: the mean over seeds, and each seed's own in brackets."""
    lines = [f"| model | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, title in MODELS.items():
        cells = [_cell([_value(record["models"][name], keys) for record in records]) for keys in COLUMNS.values()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _value(figures: Any, keys: tuple[str, ...]) -> float:
    for key in keys:
        figures = figures[key]
    return figures["mean"] if isinstance(figures, dict) else figures


def _cell(values: list[float]) -> str:
    return f"{100 * fmean(values):.1f} ({', '.join(f'{100 * value:.1f}' for value in values)})"


@exit_on_user_error
def main(folders: Annotated[list[Path] | None, typer.Argument(help="outputs of finished quickstarts")] = None) -> None:
    """Record finished quickstarts and print the table."""
    for folder in folders or ():
        record = record_of(folder)
        write_json(record, RESULTS / f"quickstart_seed{record['seed']}.json")
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("quickstart_seed*.json"))]
    if not records:
        raise UserError(f"{RESULTS} holds no quickstart_seed*.json; give output folders of finished quickstarts")
    typer.echo(to_markdown(records))


if __name__ == "__main__":
    typer.run(main)
