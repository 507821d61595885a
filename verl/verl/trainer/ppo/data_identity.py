"""Which data a run trains on, and in which order: a place in it means nothing in other data."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from verl.utils.dataset.rl_dataset import RLHFDataset, file_list

ORDER_KEYS = ("data.train_batch_size", "data.shuffle", "data.dataloader_num_workers")


def data_identity(config: DictConfig, dataset: RLHFDataset) -> dict[str, Any]:
    """What must be as it was for a run to go on at the same place of its data.

    Returns:
        `files`: size and hash of each training file (their paths may change); `prompts`: how many are left after the
        filter for length, and a hash of which; `settings`: what decides the order.
    """
    rows = np.asarray(dataset.values("row_index"), dtype=np.int64)
    return {
        "files": [_file_identity(Path(file)) for file in file_list(config.data.train_files)],
        "prompts": {"count": len(rows), "sha256": hashlib.sha256(rows.tobytes()).hexdigest()},
        "settings": {key: _select(config, key) for key in ORDER_KEYS},
    }


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two identities, each in words that name the file or key."""
    if len(then["files"]) != len(now["files"]):
        return [f"data.train_files were {len(then['files'])} and are {len(now['files'])}"]
    changed = [
        f"data.train_files: {new['path']} has changed ({old['bytes']} bytes then, {new['bytes']} now)"
        for old, new in zip(then["files"], now["files"])
        if old["sha256"] != new["sha256"]
    ]
    changed += [
        f"{key} was {then['settings'][key]} and is {value}"
        for key, value in now["settings"].items()
        if then["settings"][key] != value
    ]
    if not changed and then["prompts"] != now["prompts"]:
        counts = then["prompts"]["count"], now["prompts"]["count"]
        changed = ["other prompts pass data.max_prompt_length (or its filter, or the tokenizer): {} then, {} now"]
        changed = [changed[0].format(*counts)]
    return changed


def _file_identity(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"path": str(file), "bytes": file.stat().st_size, "sha256": digest}


def _select(config: DictConfig, key: str) -> Any:
    section, name = key.split(".")
    return config[section][name]
