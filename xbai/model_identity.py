"""Which model a folder holds, told without reading all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

DIGEST_BYTES = 1 << 16
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "config.json")
SCORE_HEAD = "score_module.pt"


def model_identity(model_path: str | Path, with_head: bool = True) -> str:
    """`name:digest`: the folder's name, and a digest of its configuration and weights (size, head, tail of each file).

    The digest is the same for copies of a folder, whatever their names; a score head counts `with_head`. What is no
    folder is its own identity.
    """
    folder = Path(model_path)
    if not folder.is_dir():
        return str(model_path)
    patterns = (*WEIGHT_PATTERNS, SCORE_HEAD) if with_head else WEIGHT_PATTERNS
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(DIGEST_BYTES))
            stream.seek(max(0, path.stat().st_size - DIGEST_BYTES))
            digest.update(stream.read())
    return f"{folder.resolve().name}:{digest.hexdigest()[:16]}"


def is_same_model(one: str, other: str) -> bool:
    """Whether two identities mean the same weights, whatever the folders' names."""
    return one.rpartition(":")[2] == other.rpartition(":")[2]
