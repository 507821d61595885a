"""System calls that a filter leaves to another process to decide (see seccomp_unotify(2))."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import struct
from functools import cache

from xbai.sandbox import libc, seccomp

_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1
_NUMBER, _ANSWER = struct.Struct("=Q"), struct.Struct("=QqiI")


@cache
def _sizes() -> tuple[int, int, int]:
    """Bytes of the kernel's notification, answer and call."""
    sizes = (ctypes.c_uint16 * 3)()
    libc.syscall(seccomp.call_number(), seccomp.GET_NOTIF_SIZES, 0, sizes)
    return tuple(sizes)


def let_pass(listener: int) -> None:
    """Let the call that waits go on, unless its thread is gone.

    The listener, which `seccomp.restrict_calls` returned there, is readable when a call waits.
    """
    call = bytearray(_sizes()[0])
    try:
        fcntl.ioctl(listener, _RECEIVE, call)
        (number,) = _NUMBER.unpack_from(call)
        answer = _ANSWER.pack(number, 0, 0, _CONTINUE).ljust(_sizes()[1], b"\0")
        fcntl.ioctl(listener, _SEND, bytearray(answer))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINTR):
            raise
