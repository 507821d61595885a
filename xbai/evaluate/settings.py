"""What decides the contents of a result file, so that one file never mixes two runs."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xbai.errors import UserError

DIGEST_BYTES = 1 << 16
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "score_module.pt", "config.json")


@dataclass(frozen=True)
class RunSettings:
    """The settings that results of one file share. The number of samples is not among them: a run may be extended."""

    task: str
    model: str
    questions: str
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    max_tokens: int
    stop: tuple[str, ...]
    seed: int | None
    search: dict[str, Any] = field(default_factory=lambda: {"name": "best_of_n"})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, as it stands in result files."""
        return {**asdict(self), "stop": list(self.stop)}

    def check_same(self, found: dict[str, Any], path: Path) -> None:
        """Refuse a file that other settings made.

        Raises:
            UserError: names what differs.
        """
        ours = self.to_dict()
        # Files of before there were searches do not name theirs.
        found = {"search": {"name": "best_of_n"}, **found}
        differing = [
            f"{key}={found.get(key)!r}, now {value!r}" for key, value in ours.items() if found.get(key) != value
        ]
        if differing:
            raise UserError(
                f"{path} holds results of another run ({'; '.join(differing)}); "
                "choose another --output_file or remove it"
            )


def model_identity(model_dir: str) -> str:
    """Folder name and a digest of its weights (size, head, tail of each file); a name that is no folder stays."""
    folder = Path(model_dir)
    if not folder.is_dir():
        return model_dir
    digest = hashlib.sha256()
    for path in sorted({path for pattern in WEIGHT_PATTERNS for path in folder.glob(pattern)}):
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(DIGEST_BYTES))
            stream.seek(max(0, path.stat().st_size - DIGEST_BYTES))
            digest.update(stream.read())
    return f"{folder.resolve().name}:{digest.hexdigest()[:16]}"


def digest_texts(texts: list[str]) -> str:
    """A short digest of the prompts of a benchmark."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def request_seed(seed: int | None, question: int, first_sample: int) -> int | None:
    """The seed of the request for a question's samples from `first_sample` on; None when the run has none."""
    if seed is None:
        return None
    digest = hashlib.sha256(f"{seed}/{question}/{first_sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
