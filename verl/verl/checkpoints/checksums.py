"""SHA-256 sums of the files of a checkpoint: made as they are written, checked before they are read.

    global_step_N/checkpoint.sha256         of data.pt
    global_step_N/actor/checkpoint.sha256   of every other file in actor/; critic/ alike

Each is a text that `sha256sum --check checkpoint.sha256` reads, too; its last line is the sum of the lines above. A CRC
would find a flipped bit as well, at three times the speed. But nobody waits for the sums: OpenSSL makes them outside of
Python's lock at 1 to 2 GB/s a core, each rank of what it writes to a shared disk more slowly than that; and on resuming
each checks the file that it then loads, out of the page cache.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import torch.distributed as dist

from verl.utils.first_rank import check_on_all_ranks, on_first_rank
from xbai.errors import UserError, one_line
from xbai.files import atomic_write

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

logger = logging.getLogger(__name__)

CHECKSUM_FILE = "checkpoint.sha256"
THREADS = 4
"""Of one process that checks files."""
REMEDY = (
    "take an earlier checkpoint (training: trainer.resume_mode=resume_path "
    "trainer.resume_from_path=RUN/global_step_N), or copy this one again"
)
_SEAL = b"# sum of the lines above: "


class HashedFile(io.BufferedWriter):
    """A new file that makes the `digest` of what is written to it, from its beginning to its end."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.digest = hashlib.sha256()

    def write(self, content: ReadableBuffer, /) -> int:
        """See `io.BufferedWriter`."""
        self.digest.update(content)
        return super().write(content)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_checksums(folder: Path, digests: Mapping[str, str]) -> None:
    """Write the sums of files, named relative to the folder."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()
    with atomic_write(folder / CHECKSUM_FILE) as stream:
        stream.write(lines + _seal(lines))


def read_checksums(folder: Path) -> dict[str, str]:
    """Sums by file; none in an older checkpoint.

    Raises:
        UserError: the sums are damaged, or missing though other parts of the checkpoint have some.
    """
    path = folder / CHECKSUM_FILE
    if not path.exists():
        if any((other / CHECKSUM_FILE).exists() for other in (folder.parent, *folder.iterdir())):
            raise UserError(f"{path} is missing; {REMEDY}")
        return {}
    content = path.read_bytes()
    end = content.rfind(_SEAL)
    lines = content[:end]
    if end < 0 or content[end:] != _seal(lines):
        raise UserError(f"{path} is damaged; {REMEDY}")
    entries = (line.partition("  ") for line in lines.decode(errors="replace").rstrip("\n").split("\n"))
    digests = {name: digest for digest, _, name in entries}
    check_inside(path, digests)
    return digests


def check_inside(listed_by: Path | str, names: Iterable[str]) -> None:
    """Raise a `UserError` where a list of a folder's files names one outside of it."""
    for name in names:
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise UserError(f"{listed_by} names {name!r:.200}, which is no file of this checkpoint")


def check_files(folder: Path, digests: Mapping[str, str]) -> None:
    """Raise a `UserError` of the first file that is not what was written, or cannot be read."""
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            list(pool.map(lambda name: _check_file(folder / name, digests[name]), digests))
        finally:
            pool.shutdown(cancel_futures=True)


def check_checkpoint(checkpoint: Path) -> None:
    """Make sure of every file of a checkpoint that has a sum, in all of its parts; see `check_files`."""
    for path in sorted(checkpoint.rglob(CHECKSUM_FILE)):
        check_files(path.parent, read_checksums(path.parent))


def check_together(folder: Path) -> None:
    """Make sure of every file that has a sum, each rank of some of them. A collective.

    With as many ranks as wrote the folder, each one checks the file that it will load.

    Raises:
        UserError: see `check_files`, `read_checksums`; the same on every rank.
    """
    digests = on_first_rank(lambda: read_checksums(folder))
    mine = dict(list(digests.items())[dist.get_rank() :: dist.get_world_size()])
    check_on_all_ranks(lambda: check_files(folder, mine))


def _check_file(path: Path, digest: str) -> None:
    try:
        found = file_digest(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); {REMEDY}") from error
    if found != digest:
        raise UserError(f"{path} is damaged: its bytes are not those that were written; {REMEDY}")


def _seal(lines: bytes) -> bytes:
    return _SEAL + hashlib.sha256(lines).hexdigest().encode() + b"\n"
