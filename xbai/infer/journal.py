"""The journal of a run: a file of lines that each say whether they are whole, which one process at a time writes.

A line is `CCCCCCCC {...}`: a JSON object, after the CRC-32 (`zlib.crc32`) of its bytes in eight hexadecimal digits.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from xbai.errors import UserError
from xbai.files import why_not_written, write_all
from xbai.results.settings import RunSettings

_BEGIN = re.compile(rb'(?=[0-9a-f]{8} \{")')
_NAMES_OF_SETTINGS = [b'"%s": ' % field.name.encode() for field in fields(RunSettings)]
"""A line that tells settings has all of them. No other has any, as quotes within its texts stand behind backslashes."""

Place = tuple[int, int]
"""Where a line is: the offset of its first byte, and how many there are."""


@dataclass(frozen=True)
class JournalLine:
    """What was read.

    Attributes:
        number: of the line, from 1.
        record: what it says; None where it is damaged.
        tells_settings: whether it says how the run was made, or did so before it was damaged.
    """

    number: int
    place: Place
    record: dict[str, Any] | None
    tells_settings: bool


class Journal:
    """A journal, opened and locked; made where there is none.

    Raises:
        BlockingIOError: another process has it open.
        UserError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._is_synced = True
        try:
            self._open()
            while not self._is_at_path():
                # Another run finished, and removed it, before it was locked here.
                self._file.close()
                self._open()
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._not_written(error) from None

    def lines(self) -> Iterator[JournalLine]:
        """Every line, in order, those that are damaged too. Only a last one that a death cut off is not among them.

        Where the end of a line is lost, what follows is still a line of its own.
        """
        self.size = 0
        with os.fdopen(os.dup(self._file.fileno()), "rb") as stream:
            stream.seek(0)
            for number, line in enumerate(stream, 1):
                if not line.endswith(b"\n"):
                    return
                for part, record in _parts(line):
                    tells = "settings" in record if record else any(name in part for name in _NAMES_OF_SETTINGS)
                    yield JournalLine(number, (self.size, len(part)), record, tells)
                    self.size += len(part)

    def cut_off(self) -> bool:
        """Drop what follows the lines that were read; whether there was something."""
        is_longer = os.fstat(self._file.fileno()).st_size > self.size
        if is_longer:
            self._file.truncate(self.size)
        return is_longer

    def append(self, *records: dict[str, Any]) -> list[Place]:
        """Write lines in one go; returns where they are.

        Raises:
            UserError: they cannot be written; then none of them is.
        """
        lines = [encode_line(record) for record in records]
        self._is_synced = False
        try:
            write_all(self._file, b"".join(lines))
        except OSError as error:
            self._file.truncate(self.size)
            raise self._not_written(error) from None
        places = []
        for line in lines:
            places.append((self.size, len(line)))
            self.size += len(line)
        return places

    def read(self, place: Place) -> dict[str, Any]:
        """Read a line back.

        Raises:
            UserError: it has changed since.
        """
        offset, length = place
        record = _read(os.pread(self._file.fileno(), length, offset))
        if record is None:
            raise UserError(
                f"{self.path}: damaged at byte {offset} since it was opened; run the same command again to go on "
                "without that line"
            )
        return record

    def sync(self) -> None:
        """Wait until the disk has what is written, which the machine's death then spares. May run in its own thread.

        Raises:
            UserError: the disk did not take it.
        """
        if not self._is_synced:
            self._is_synced = True
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                self._is_synced = False
                raise self._not_written(error) from None

    def remove(self) -> None:
        """Delete and close it."""
        # In this order: who waits for the lock must not get it on a file that is about to vanish.
        self.path.unlink()
        self._file.close()

    def close(self) -> None:
        """Let go of it, flushed to the disk."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def _open(self) -> None:
        # Unbuffered: of what could not be written, nothing is left that would be written later.
        self._file = self.path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            self._file.close()
            raise

    def _is_at_path(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def _not_written(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: the journal of the run cannot be written ({why_not_written(error)})")


def encode_line(record: dict[str, Any]) -> bytes:
    """A line of a journal, its end included."""
    content = json.dumps(record, ensure_ascii=False, default=str).encode()
    return b"%08x %s\n" % (zlib.crc32(content), content)


def _parts(line: bytes) -> list[tuple[bytes, dict[str, Any] | None]]:
    """A line, or those that have become one as their ends were lost, each with what it says."""
    record = _read(line)
    if record is not None:
        return [(line, record)]
    return [(part, _read(part)) for part in _BEGIN.split(line) if part]


def _read(line: bytes) -> dict[str, Any] | None:
    """What a line says; None where it is damaged."""
    checksum, _, content = line.removesuffix(b"\n").partition(b" ")
    if checksum != b"%08x" % zlib.crc32(content):
        return None
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
