"""Writing files so that a reader never sees half of one, whenever the process dies."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import IO

from xbai.errors import UserError, one_line

_REMEDIES = {
    errno.ENOSPC: "make room or choose another folder",
    errno.EDQUOT: "make room or choose another folder",
    errno.EFBIG: "choose a folder that takes larger files",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that can be written",
    errno.EPERM: "choose a folder that can be written",
    errno.EEXIST: "choose another folder",
    errno.ENOENT: "choose another folder",
    errno.ENOTDIR: "choose another folder",
    errno.ENAMETOOLONG: "choose a shorter path",
}


def why_not_written(error: BaseException) -> str:
    """Why something could not be written, in one line, with what to do about it where the system's error says so."""
    if isinstance(error, UserError):
        return str(error)
    text = f"{type(error).__name__}: {one_line(error)[:300]}"
    remedy = _REMEDIES.get(error.errno) if isinstance(error, OSError) else None
    return text if remedy is None else f"{text}; {remedy}"


def check_room(folder: Path, needed: int) -> None:
    """Raise the error of a full disk where fewer than `needed` bytes are free.

    Network file systems that know no size are believed to have room.
    """
    disk = shutil.disk_usage(folder)
    if disk.total and needed > disk.free:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:,.0f} MB are needed, {disk.free / 1e6:,.0f} MB are free")


def fsync_path(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, children before parents."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            fsync_path(Path(root) / name)
        fsync_path(Path(root))


def remove_leftovers(path: Path) -> None:
    """Delete the temporary siblings of `path` that its writers left behind when they were killed."""
    for leftover in path.parent.glob(f".{escape(path.name)}.????????.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary sibling of `path` for writing; on success it is flushed and takes the name `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_sibling(path)
    try:
        with temporary.open(mode) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


@contextmanager
def atomic_directory(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary sibling folder; on success it is flushed and takes the name `path`.

    With `replace` a folder of that name moves away first, and is deleted last: whoever is killed in between leaves
    nothing at `path`, but never half a folder.

    Raises:
        FileExistsError: when `path` exists already, without `replace`.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise FileExistsError(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _temporary_sibling(path), _temporary_sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        fsync_tree(temporary)
        if replace and path.exists():
            path.rename(old)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_path(path.parent)
    if old.exists():
        shutil.rmtree(old)
