"""Which data a run trains on, and in which order: a place in it means nothing in other data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from verl.checkpoints.checksums import file_digest


def data_identity(files: Sequence[str], settings: Mapping[str, Any], rows: Iterable[bytes]) -> dict[str, Any]:
    """What must be as it was for a run to go on at the same place of its data.

    Size and hash of each of `files` (their paths may change), number and hash of `rows` (what became of each, or which
    one it is) as `prompts`, and `settings`, by the keys that decide the order.
    """
    digest, count = hashlib.sha256(), 0
    for row in rows:
        digest.update(row)
        count += 1
    return {
        "files": [
            {"path": str(file), "bytes": file.stat().st_size, "sha256": file_digest(file)} for file in map(Path, files)
        ],
        "prompts": {"count": count, "sha256": digest.hexdigest()},
        "settings": dict(settings),
    }


def differences(then: dict[str, Any], now: dict[str, Any], other_rows: str) -> list[str]:
    """What differs between two identities, each in words that name the file or key.

    `other_rows` is how to say that files and settings are the same and the rows are not, and by what.
    """
    if len(then["files"]) != len(now["files"]):
        return [f"data.train_files were {len(then['files'])} and are {len(now['files'])}"]
    changed = [
        f"data.train_files: {new['path']} has changed ({old['bytes']} bytes then, {new['bytes']} now)"
        for old, new in zip(then["files"], now["files"], strict=True)
        if old["sha256"] != new["sha256"]
    ]
    changed += other_settings(then["settings"], now["settings"])
    if not changed and then["prompts"] != now["prompts"]:
        changed = [f"{other_rows}: {then['prompts']['count']} then, {now['prompts']['count']} now"]
    return changed


def other_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which keys have other values, each in words."""
    return [f"{key} was {then.get(key)} and is {value}" for key, value in now.items() if then.get(key) != value]
