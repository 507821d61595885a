"""Writing files so that a reader never sees half of one, whenever the process dies."""

import errno
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from io import RawIOBase
from pathlib import Path
from typing import IO, Any

from xbai.errors import DISK_FULL, UserError, one_line

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
_OF_WRITING = {*DISK_FULL, errno.EFBIG}
"""What only writing to a disk fails by."""
_MOST_LINKS = 40
"""As many as Linux follows."""
_OWN_DESCRIPTORS = Path("/proc/self/fd")


def why_not_written(error: BaseException) -> str:
    """Why something could not be written, in one line, with what to do about it where the system's error says so."""
    if isinstance(error, UserError):
        return str(error)
    text = f"{type(error).__name__}: {one_line(error)[:300]}"
    remedy = _REMEDIES.get(error.errno) if isinstance(error, OSError) and error.errno else None
    return text if remedy is None else f"{text}; {remedy}"


def not_written(path: str | Path, error: OSError) -> UserError:
    """The error to raise where a file or folder could not be written."""
    return UserError(f"{path}: cannot be written ({why_not_written(error)})")


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
    path = followed(path)
    for leftover in path.parent.glob(f".{escape(path.name)}.????????.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def write_all(stream: RawIOBase, content: bytes) -> None:
    """Write to a file without a buffer, which may take a part at a time."""
    rest = memoryview(content)
    while rest:
        rest = rest[stream.write(rest) :]


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def followed(path: str | Path) -> Path:
    """What `path` leads to where it is a symbolic link, whether or not there is such a file; else `path`.

    Those of /proc, to which /dev/stdout and /dev/fd lead, are not followed: they stand for what a process has open.

    Raises:
        UserError: the links lead in a circle.
    """
    found = Path(path)
    for _ in range(_MOST_LINKS):
        if not found.is_symlink() or found.parent.resolve().is_relative_to("/proc"):
            return found
        found = found.parent / found.readlink()
    raise UserError(f"{path}: its symbolic links lead in a circle; remove them, or name another file")


def is_replaced(path: str | Path) -> bool:
    """Whether `atomic_write` makes a file anew: where there is none or a regular one.

    Raises:
        UserError: a folder, a socket, or links that lead in a circle.
        OSError: it cannot be known.
    """
    path = followed(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return True
    if stat.S_ISDIR(mode):
        raise UserError(f"{path}: a folder; name a file")
    if stat.S_ISSOCK(mode) and not path.is_symlink():
        raise UserError(f"{path}: a socket; name a file")
    return stat.S_ISREG(mode) and not path.is_symlink()


def check_writable(path: str | Path) -> None:
    """Refuse a name to which `atomic_write` could not write (call it before the work whose outcome is written).

    Raises:
        UserError: says why.
    """
    try:
        if not is_replaced(path):
            return
        temporary = _sibling_in_its_folder(path)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise not_written(path, error) from None


def _sibling_in_its_folder(path: str | Path) -> Path:
    """A free name beside what `path` leads to, in a folder that is there."""
    temporary = _temporary_sibling(followed(path))
    temporary.parent.mkdir(parents=True, exist_ok=True)
    return temporary


def check_directory(path: str | Path) -> None:
    """Refuse a name at which `atomic_directory` could make no folder (call it before the work that fills it).

    Raises:
        UserError: says why.
    """
    try:
        temporary = _sibling_in_its_folder(path)
        temporary.mkdir()
        temporary.rmdir()
    except OSError as error:
        raise not_written(path, error) from None


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary sibling of `path` for writing; on success it is flushed and takes the name `path`.

    A file that it replaces hands on its mode bits, and its owner where that is allowed. A symbolic link is followed:
    what it names is replaced, or made, and the link stays. A device, a FIFO and what a process has open (/dev/null,
    /dev/stdout) are no files to be replaced: they receive the bytes as they are written.

    Args:
        path: the file. Folders above it that are missing are made.
        mode: of `open`: "w", "wb" or "w+b".

    Raises:
        UserError: a folder, a socket, links that lead in a circle, or what cannot be written.
    """
    try:
        replaced, target = is_replaced(path), followed(path)
    except OSError as error:
        raise not_written(path, error) from error
    temporary = _temporary_sibling(target)
    try:
        if replaced:
            with _replacing(target, temporary, mode) as stream:
                yield stream
        else:
            with _open_in_place(target, mode) as stream:
                yield stream
    except OSError as error:
        if _is_of_writing(error, target, temporary):
            raise not_written(path, error) from error
        raise


@contextmanager
def _replacing(target: Path, temporary: Path, mode: str) -> Iterator[IO]:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open(mode, encoding=_encoding(mode)) as stream:
            _inherit(stream.fileno(), target)
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(target.parent)


def _is_of_writing(error: OSError, target: Path, temporary: Path) -> bool:
    """Whether an error is of writing this file, not of what is read meanwhile to be written there."""
    if error.filename is None:
        return error.errno in _OF_WRITING
    return Path(str(error.filename)) in (target, temporary, *target.parents)


def _open_in_place(path: Path, mode: str) -> IO:
    if path.parent.resolve() == _OWN_DESCRIPTORS.resolve():
        # Opened again, a file to which the standard output goes would be written from its beginning.
        return os.fdopen(os.dup(int(path.name)), mode, encoding=_encoding(mode))
    return path.open(mode.replace("w", "a"), encoding=_encoding(mode))


def _encoding(mode: str) -> str | None:
    """Of a text UTF-8, whatever the locale says."""
    return None if "b" in mode else "utf-8"


def _inherit(descriptor: int, path: Path) -> None:
    """Give a new file owner and mode bits of the one that it replaces, if there is one."""
    with suppress(FileNotFoundError):
        found = path.stat()
        with suppress(PermissionError):
            os.fchown(descriptor, found.st_uid, found.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(found.st_mode))


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file for people to read, in one piece."""
    with atomic_write(path, "w") as stream:
        json.dump(value, stream, indent=2)
        stream.write("\n")


@contextmanager
def atomic_directory(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary sibling folder; on success it is flushed and takes the name `path`.

    With `replace` a folder of that name moves away first, and is deleted last: whoever is killed in between leaves
    nothing at `path`, but never half a folder. A symbolic link is followed, and stays.

    Raises:
        FileExistsError: when `path` exists already, without `replace`, or is no folder.
        UserError: symbolic links lead in a circle.
        OSError: it cannot be written.
    """
    path = followed(path)
    if path.exists() and not (replace and path.is_dir()):
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
