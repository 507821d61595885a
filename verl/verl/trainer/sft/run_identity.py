"""What decides the result of a supervised run: which checkpoints it can go on from, and which model is its own."""

from __future__ import annotations

import json
from array import array
from dataclasses import asdict
from pathlib import Path
from typing import Any

from verl.checkpoints.data_identity import data_identity, differences, other_settings
from verl.trainer.config.compose import leaves
from verl.trainer.config.fields import value_at
from verl.trainer.config.sft import SFTConfig
from verl.utils.dataset.rl_dataset import file_list
from verl.utils.dataset.sft_dataset import SFTDataset, SFTExample
from xbai.model_identity import is_same_model, model_identity
from xbai.sprm import SPRMConfig

ORDER_KEYS = ("data.train_batch_size", "data.prompt_key", "data.response_key", "data.label_key", "trainer.seed")
"""What decides which rows a step trains on."""
OTHER_ROWS = "the tokenizer or chat template in model.path makes other tokens of the rows"
PLACES = ("data.train_files", "model.path")
"""Keys whose files count, wherever they lie."""


def run_identity(
    config: SFTConfig, dataset: SFTDataset, sprm_config: SPRMConfig | None, total_steps: int
) -> dict[str, Any]:
    """All of a run that its result depends on, in values that JSON keeps as they are.

    Returns:
        `data`: from `data_identity`; `model`: from `model_identity`, of the one that training begins with; `head`: the
        score head's form, None without one; `settings`: values by key.
    """
    head = None
    if sprm_config is not None:
        form = sprm_config.to_dict()
        head = form.pop("step_rule") | form
    order = {key: value_at(config, key) for key in ORDER_KEYS}
    identity = {
        "data": data_identity(file_list(config.data.train_files), order, map(_row, dataset.examples)),
        "model": model_identity(config.model.path),
        "head": head,
        "settings": _settings(config) | {"trainer.total_training_steps": total_steps},
    }
    return json.loads(json.dumps(identity))


def what_forbids_going_on(then: dict[str, Any], now: dict[str, Any], model_path: str | Path) -> list[str]:
    """Where the run of identity `then` trained something else than that of `now`, in words that name key or file."""
    found = differences(then["data"], now["data"], OTHER_ROWS)
    if not is_same_model(then["model"], now["model"]):
        found.append(f"model.path={model_path} was {then['model']} and is {now['model']}")
    # Whether there is a head follows from the data.
    changed = other_settings(then["head"] or {}, now["head"] or {})
    found += [f"{change:.120} for the score head (score.*, or sprm_config.json in model.path)" for change in changed]
    return found


def what_changed(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings that may change under a run, and have, in words that name the key."""
    return other_settings(then["settings"], now["settings"])


def _settings(config: SFTConfig) -> dict[str, Any]:
    """Values of keys that say what is trained and how, but not where it lies or who hears of it."""
    given = leaves(asdict(config))
    kept = {key: value for key, value in given if not key.startswith("trainer.") and key not in PLACES}
    return kept | {"trainer.output_dtype": config.trainer.output_dtype}


def _row(example: SFTExample) -> bytes:
    outcome = -1 if example.correct is None else int(example.correct)
    return array("q", [outcome, example.prompt_length, *example.ids]).tobytes()
