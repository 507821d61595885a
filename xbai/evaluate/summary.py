"""One JSON file that says what training brought: the model before and after RL, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xbai.errors import UserError
from xbai.evaluate.metrics import Report
from xbai.evaluate.settings import MODELS, differing_settings
from xbai.files import atomic_write

MAY_DIFFER = (*MODELS, "lang", "seed")
SUMMARY_COUNTS = (2, 8, 32)
SUMMARY_STRATEGIES = ("best_of_n", "majority", "oracle", "random")


def build_summary(base: Report, rl: Report, seconds_total: float | None = None) -> dict[str, Any]:
    """The summary of a run; JSON-ready, undefined values are None.

    Args:
        base: results of the model before RL.
        rl: results of the model after it, on the same questions with the same sampling.
        seconds_total: wall time of the whole run.

    Raises:
        UserError: the two were not sampled alike, or with too few samples.
    """
    base_settings, rl_settings = base.settings or {}, rl.settings or {}
    differing = {
        name: (base_settings.get(name), rl_settings.get(name))
        for name in differing_settings(base.settings, rl.settings)
        if name not in MAY_DIFFER
    }
    if base.questions != rl.questions:
        differing["the number of questions"] = base.questions, rl.questions
    if differing:
        differences = "; ".join(f"{name} ({one!r}, {other!r})" for name, (one, other) in differing.items())
        raise UserError(f"the two result files differ in {differences}: evaluate both models alike")
    base_model, rl_model = base.to_dict(), rl.to_dict()
    return {
        "seconds_total": seconds_total,
        "problems": rl.questions,
        "samples": rl.samples,
        "temperature": rl_settings.get("temperature"),
        "pass_at_1": {"base": base.mean_at_1.mean, "rl": rl.mean_at_1.mean},
        "pass_at_1_standard_error": {
            "base": base_model["mean_at_1"]["standard_error"],
            "rl": rl_model["mean_at_1"]["standard_error"],
        },
        **_accuracies(rl_model),
        "base_model": _accuracies(base_model),
    }


def _accuracies(report: dict[str, Any]) -> dict[str, Any]:
    missing = [n for n in SUMMARY_COUNTS if str(n) not in report["curves"]["random"]]
    if missing:
        raise UserError(f"the summary needs N={missing[0]}, but a question has only {report['samples']} samples")
    if "best_of_n" not in report["curves"]:
        raise UserError("the summary needs scores: run inference again with scores")
    curves = {
        strategy: {str(n): report["curves"][strategy][str(n)]["mean"] for n in SUMMARY_COUNTS}
        for strategy in SUMMARY_STRATEGIES
    }
    return {**curves, "auc": report["auc"], "within_prompt_auc": report["within_prompt_auc"]}


def write_json(value: dict[str, Any], path: Path) -> None:
    """Write a JSON file in one piece."""
    with atomic_write(path, "w") as stream:
        json.dump(value, stream, indent=2)
        stream.write("\n")
