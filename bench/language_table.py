"""The README's table of the language recipe, from the summaries that are committed.

    python bench/language_table.py

Reads `bench/results/language_seed*.json` and, of the arm at the published setting, `language_published_seed*.json`:
each the `summary.json` of a `scripts/language.sh`. Prints Markdown: what each way of choosing achieves in either arm
(means over the seeds), and differences paired by question (each seed with its standard error); on questions of the
kinds that were trained on, and on held-out kinds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from machine import ROOT

from xbai.errors import UserError, exit_on_user_error

RESULTS = ROOT / "bench/results"
ARMS = {"recommended": "language_seed*.json", "published setting": "language_published_seed*.json"}
KINDS = {"Kinds that were trained on": (), "Held-out kinds": ("held_out",)}
COUNTS = ("2", "8", "32")
CHOICES = {
    "majority": (("majority",), None),
    "mean log-prob (free)": (("free_baselines", "mean_log_prob"), "best_of_n_log_prob"),
    "shortest (free)": (("free_baselines", "shortest"), "shortest"),
    "score": (("best_of_n",), "best_of_n"),
    "score and log-prob": (("best_of_n_combined",), "best_of_n_combined"),
    "oracle": (("oracle",), None),
}
"""Where a summary holds the accuracies of a way of choosing, and the name of its signal."""

DIFFERENCES = {
    "Best-of-8 less one sample": ("best_of_n - random", "8"),
    "Best-of-8 less majority of 8": ("best_of_n - majority", "8"),
    "Best-of-8 less Best-of-8 by log-prob": ("best_of_n - best_of_n_log_prob", "8"),
    "Best-of-32 less Best-of-8": ("best_of_n - best_of_n at 8", "32"),
    "by both: Best-of-8 less majority of 8": ("best_of_n_combined - majority", "8"),
    "by both: Best-of-8 less Best-of-8 by log-prob": ("best_of_n_combined - best_of_n_log_prob", "8"),
    "by both: Best-of-32 less Best-of-8": ("best_of_n_combined - best_of_n_combined at 8", "32"),
}
NONE = "-"

Summary = dict[str, Any]


def to_markdown(arms: dict[str, list[Summary]]) -> str:
    """Both tables for each kind of question; an arm's summaries are those of its seeds."""
    parts = []
    for title, path in KINDS.items():
        of_kind = {
            arm: found
            for arm, summaries in arms.items()
            if (found := [s for s in _each(summaries, path) if s is not None])
        }
        if of_kind:
            first = next(iter(of_kind.values()))[0]
            parts.append(
                f"**{title}** ({first['problems']} questions)\n\n{_accuracies(of_kind)}\n\n{_differences(of_kind)}\n"
            )
    return "\n".join(parts)


def _accuracies(arms: dict[str, list[Summary]]) -> str:
    header = ["choose by"]
    for arm, summaries in arms.items():
        header += [
            f"{arm} ({len(summaries)} {'seed' if len(summaries) == 1 else 'seeds'}): Best-of-2 / 8 / 32",
            "AUC within a prompt",
        ]
    rows = [
        [
            title,
            *(cell for summaries in arms.values() for cell in (_percent(_each(summaries, ("pass_at_1", model))), NONE)),
        ]
        for title, model in (("one sample, before RL", "base"), ("one sample, after RL", "rl"))
    ]
    for title, (path, signal) in CHOICES.items():
        row = [title]
        for summaries in arms.values():
            row.append(" / ".join(_percent(_each(summaries, (*path, n))) for n in COUNTS))
            row.append(_percent(_each(summaries, ("signals", signal, "within_prompt_auc", "mean"))))
        rows.append(row)
    return _table(header, rows)


def _differences(arms: dict[str, list[Summary]]) -> str:
    rows = [
        [title, *(", ".join(map(_points, _each(summaries, ("differences", *path)))) for summaries in arms.values())]
        for title, path in DIFFERENCES.items()
    ]
    return _table(["points, each seed, ± standard error", *arms], rows)


def _each(summaries: Sequence[Summary], path: Sequence[str | None]) -> list[Any]:
    """What each summary holds at a path of keys; None where it has none."""
    found = []
    for value in summaries:
        for key in path:
            value = None if value is None else value.get(key)
        found.append(value)
    return found


def _percent(values: Sequence[float | None]) -> str:
    return NONE if None in values else f"{100 * fmean(values):.1f}"


def _points(estimate: dict[str, float | None] | None) -> str:
    if estimate is None:
        return NONE
    error = estimate["standard_error"]
    return f"{100 * estimate['mean']:+.1f}" + ("" if error is None else f" ±{100 * error:.1f}")


def _table(header: list[str], rows: list[list[str]]) -> str:
    rows = [row for row in rows if any(set(cell) - set(" /,-") for cell in row[1:])]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@exit_on_user_error
def main(results: Annotated[Path, typer.Option(help="folder of the summaries")] = RESULTS) -> None:
    """Print the tables."""
    arms = {
        arm: [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob(pattern))]
        for arm, pattern in ARMS.items()
    }
    if not any(arms.values()):
        raise UserError(f"{results} holds no {ARMS['recommended']}; copy summary.json of scripts/language.sh there")
    typer.echo(to_markdown({arm: summaries for arm, summaries in arms.items() if summaries}))


if __name__ == "__main__":
    typer.run(main)
