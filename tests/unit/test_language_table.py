"""The language recipe's table: the numbers of the committed summaries, both arms side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import numpy as np

from xbai.measure.graded import GradedQuestion
from xbai.measure.metrics import measure
from xbai.measure.summary import build_summary

SCRIPT = Path(__file__).parents[2] / "bench/language_table.py"
COUNTS = ("2", "8", "32")


def part(level: float, seed: int, has_log_probs: bool = True) -> dict:
    """What a summary says of one set of questions; every number is another one."""

    def curve(start: float) -> dict[str, float]:
        return {n: round(start + 0.01 * i + 0.001 * seed, 4) for i, n in enumerate(COUNTS)}

    estimate = {"mean": 0.0512 + 0.001 * seed, "standard_error": 0.0123}
    free = {"mean_log_prob": curve(level + 0.05), "shortest": curve(level - 0.05)}
    signals = {"best_of_n": {"within_prompt_auc": {"mean": level + 0.2, "standard_error": 0.01}, "auc": 0.9}}
    return {
        "problems": 200,
        "pass_at_1": {"base": level - 0.1, "rl": level},
        "majority": curve(level + 0.02),
        "best_of_n": curve(level + 0.07),
        "oracle": curve(level + 0.3),
        **({"free_baselines": free} if has_log_probs else {}),
        "differences": {"best_of_n - majority": {"8": estimate}},
        "signals": signals,
    }


def rows(text: str) -> dict[str, list[str]]:
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {name: values for name, *values in cells}


def test_both_arms_stand_side_by_side(tmp_path: Path) -> None:
    ours = [{**part(0.6, seed), "held_out": part(0.4, seed)} for seed in (0, 1)]
    theirs = [part(0.5, 0, has_log_probs=False)]
    for seed, summary in enumerate(ours):
        (tmp_path / f"language_seed{seed}.json").write_text(json.dumps(summary), encoding="utf-8")
    (tmp_path / "language_published_seed0.json").write_text(json.dumps(theirs[0]), encoding="utf-8")
    done = subprocess.run([sys.executable, SCRIPT, "--results", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    trained, held_out = done.stdout.split("**Held-out kinds**")
    shown = rows(trained)
    assert shown["choose by"][0].startswith("recommended (2 seeds)") and "published" in shown["choose by"][2]

    def means(summaries: list[dict], *path: str) -> str:
        found = []
        for n in COUNTS:
            values = summaries
            for key in (*path, n):
                values = [value[key] for value in values]
            found.append(f"{100 * fmean(values):.1f}")
        return " / ".join(found)

    assert shown["score"] == [means(ours, "best_of_n"), "80.0", means(theirs, "best_of_n"), "70.0"]
    assert shown["mean log-prob (free)"] == [means(ours, "free_baselines", "mean_log_prob"), "-", "- / - / -", "-"]
    assert shown["one sample, after RL"] == ["60.0", "-", "50.0", "-"]
    assert shown["Best-of-8 less majority of 8"] == ["+5.1 ±1.2, +5.2 ±1.2", "+5.1 ±1.2"]
    assert "score and log-prob" not in shown, "nothing was measured of it"
    (only_arm, auc) = rows(held_out)["score"]
    assert (only_arm, auc) == (means([each["held_out"] for each in ours], "best_of_n"), "60.0")


def test_every_row_is_found_in_what_xbai_summary_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    questions = [
        GradedQuestion(
            key=(number, ""),
            scores=rng.random(32),
            correct=(rng.random(32) < 0.5).astype(float),
            keys=["a"] * 32,
            step_scores=[None] * 32,
            token_counts=list(range(32)),
            finish_reasons=["stop"] * 32,
            mean_log_probs=-rng.random(32),
            combined=rng.random(32),
        )
        for number in range(3)
    ]
    report = measure(questions)
    (tmp_path / "language_seed0.json").write_text(
        json.dumps(build_summary(report, report, None, report, report)), encoding="utf-8"
    )
    done = subprocess.run([sys.executable, SCRIPT, "--results", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for shown in map(rows, done.stdout.split("**Held-out kinds**")):
        assert len(shown) == 2 + 1 + 2 + 6 + 7, "two headers and their rule, one sample twice, choices, differences"
        assert "- / - / -" not in [values[0] for values in shown.values()]
        assert shown["score and log-prob"][0].endswith(f" / {100 * report.curves['best_of_n_combined'][32].mean:.1f}")


def test_without_summaries_it_says_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--results", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert "copy summary.json of scripts/language.sh there" in done.stderr
