"""Landlock: which files this thread and its descendants may use from here on (see landlock(7))."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from xbai.sandbox import libc

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH = 1
_QUERY_VERSION = 1

_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
_READ = _READ_FILE | _READ_DIR
_WRITE = _WRITE_FILE | _TRUNCATE
_TCP, _SCOPES = 0b11, 0b11

NEEDED_VERSION = 3
"""The first one (Linux 6.2) to cover truncation."""


@cache
def is_available() -> bool:
    """Whether the kernel has what `restrict_files` needs."""
    try:
        return libc.syscall(_CREATE_RULESET, None, 0, _QUERY_VERSION) >= NEEDED_VERSION
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return False
        raise


def restrict_files(readable: Iterable[Path]) -> None:
    """Leave this process the reading of `readable`, and the null device; nothing is executable.

    Where the kernel can, TCP, signals to others and abstract sockets are closed as well.
    """
    version = libc.syscall(_CREATE_RULESET, None, 0, _QUERY_VERSION)
    files = (1 << (16 if version >= 5 else 15)) - 1
    attributes = struct.pack("QQQ", files, _TCP if version >= 4 else 0, _SCOPES if version >= 6 else 0)
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.c_char_p(attributes), len(attributes), 0)
    try:
        for path in readable:
            _allow(ruleset, path, _READ)
        _allow(ruleset, Path(os.devnull), _READ | _WRITE)
        libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
        libc.syscall(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    if not path.is_dir():
        rights &= _READ_FILE | _WRITE
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", rights, descriptor)
        libc.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.c_char_p(rule), 0)
    finally:
        os.close(descriptor)
