"""Why the quickstart leaves the published score setting: the same run with each switch put back, one at a time.

    python bench/ablation.py [--jobs 2] [--out outputs/ablation]

Needs a finished `scripts/quickstart.sh`, whose data (and, for the RL variants, base model) every variant shares. Each
variant runs the remaining stages of the quickstart on one process. Prints a Markdown table and, as the last line, the
JSON that it writes to `bench/results/ablation.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from xbai.errors import UserError, exit_on_user_error
from xbai.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
SCORE = "actor_rollout_ref.score"


@dataclass(frozen=True)
class Variant:
    """One row: the quickstart with some overrides in its supervised or its RL stage."""

    title: str
    stage: str
    overrides: str = ""

    @property
    def model(self) -> str:
        """Whose figures the row shows: the base's for a supervised variant, the trained model's for an RL one."""
        return "base_model" if self.stage == "sft" else "rl"


UNCHANGED = {"sft": Variant("SFT as in the quickstart", "sft"), "rl": Variant("RL as in the quickstart", "rl")}
VARIANTS = {
    "sft_grad_scale": Variant("SFT, gradient scale 1e-4", "sft", "score.backbone_grad_scale=1e-4"),
    "sft_agreement": Variant("SFT, agreement weighting", "sft", "score.agreement_weighting=true"),
    "rl_grad_scale": Variant("RL, gradient scale 1e-4", "rl", f"{SCORE}.backbone_grad_scale=1e-4"),
    "rl_agreement": Variant("RL, agreement weighting", "rl", f"{SCORE}.agreement_weighting=true"),
}
# Outputs and finished stages that a variant takes from the quickstart: all it does not change.
SHARED = {
    "sft": (["data", "tiny", "rl", "model", "results/rl.jsonl"], ["setup", "data", "rl", "merge", "evaluate_rl"]),
    "rl": (["data", "tiny", "base", "results/base.jsonl"], ["setup", "data", "sft", "evaluate_base"]),
}


def run_variant(name: str, variant: Variant, quickstart: Path, out: Path) -> dict[str, Any]:
    """Run what the variant does not share with the quickstart; returns its row of figures."""
    folder = out / name
    share(variant, quickstart, folder)
    arguments = {f"{variant.stage.upper()}_ARGS": variant.overrides, "OUT": str(folder), "RANKS": "1"}
    environment = {**os.environ, **arguments}
    log = out / f"{name}.log"
    with log.open("ab") as stream:
        status = subprocess.run(
            ["bash", str(ROOT / "scripts/quickstart.sh")], env=environment, stdout=stream, stderr=subprocess.STDOUT
        ).returncode
    if status:
        raise UserError(f"variant {name} failed, see {log}")
    return row_of(variant, json.loads((folder / "summary.json").read_text(encoding="utf-8")))


def share(variant: Variant, quickstart: Path, folder: Path) -> None:
    """Copy the quickstart's finished stages that the variant does not change."""
    if folder.exists():
        return
    outputs, stages = SHARED[variant.stage]
    for relative in [*outputs, *(f"stages/{stage}" for stage in stages)]:
        source, target = quickstart / relative, folder / relative
        if not source.exists():
            raise UserError(f"{source}: not there; run scripts/quickstart.sh to its end first")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


def row_of(variant: Variant, summary: dict[str, Any]) -> dict[str, Any]:
    """The figures of one variant."""
    part = summary if variant.model == "rl" else summary["base_model"]
    pass_at_1 = summary["pass_at_1"]["rl" if variant.model == "rl" else "base"]
    keys = ("best_of_n", "majority", "auc", "within_prompt_auc")
    return {"title": variant.title, "overrides": variant.overrides, "pass_at_1": pass_at_1} | {k: part[k] for k in keys}


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/results.md: percentages."""
    lines = [
        "| setting | pass@1 | Best-of-2 / 8 / 32 | maj@8 | AUC within a prompt | AUC |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        best = " / ".join(_percent(row["best_of_n"][n]) for n in ("2", "8", "32"))
        others = map(_percent, (row["majority"]["8"], row["within_prompt_auc"], row["auc"]))
        lines.append(f"| {row['title']} | {_percent(row['pass_at_1'])} | {best} | {' | '.join(others)} |")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


@exit_on_user_error
def main(
    quickstart: Annotated[Path, typer.Option(help="a finished quickstart")] = ROOT / "outputs/quickstart",
    out: Annotated[Path, typer.Option(help="where the variants go")] = ROOT / "outputs/ablation",
    jobs: Annotated[int, typer.Option(min=1, help="variants at a time, each on one process")] = 2,
    only: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(VARIANTS)}")] = None,
) -> None:
    """Run all variants and write the table."""
    unknown = sorted(set(only or ()) - VARIANTS.keys())
    if unknown:
        raise UserError(f"--only {unknown[0]}: unknown variant, use one of {', '.join(VARIANTS)}")
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        futures = {
            name: pool.submit(run_variant, name, variant, quickstart.resolve(), out.resolve())
            for name, variant in VARIANTS.items()
            if not only or name in only
        }
        rows = {name: future.result() for name, future in futures.items()}
    summary = json.loads((quickstart / "summary.json").read_text(encoding="utf-8"))
    rows = {name: row_of(variant, summary) for name, variant in UNCHANGED.items()} | rows
    typer.echo(to_markdown([rows[name] for name in sorted(rows, key=lambda name: name.startswith("rl"))]))
    with atomic_write(ROOT / "bench/results/ablation.json", "w") as stream:
        json.dump(rows, stream, indent=1)
    typer.echo(json.dumps(rows))


if __name__ == "__main__":
    typer.run(main)
