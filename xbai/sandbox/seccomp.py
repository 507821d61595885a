"""A seccomp filter: no processes, no sockets, no signals to others, no changes of files (see seccomp(2))."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from fcntl import F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_GETFL, F_SETFD, F_SETFL
from functools import cache

from xbai.sandbox import libc

_PR_GET_SECCOMP = 21
_SET_MODE_FILTER, _GET_ACTION_AVAILABLE, GET_NOTIF_SIZES = 1, 2, 3
_NEW_LISTENER = 1 << 3

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def _calls(*lines: str) -> list[tuple[int | None, ...]]:
    """Of each call its number on x86_64 and on aarch64; None where there is no such call."""
    calls = (call.split() for line in lines for call in line.split(", "))
    return [tuple(None if number == "-" else int(number) for number in numbers) for _, *numbers in calls]


_REFUSED = _calls(
    # Processes.
    "fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, setpgid 109 154, setsid 112 157",
    # A pair of sockets reaches any socket in the file system that its user may write to, and carries descriptors.
    "socket 41 198, socketpair 53 199, io_uring_setup 425 425",
    # What is done to other processes.
    "kill 62 129, tkill 200 130, tgkill 234 131, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240",
    "pidfd_send_signal 424 424, pidfd_open 434 434, pidfd_getfd 438 438, ptrace 101 117",
    "process_vm_readv 310 270, process_vm_writev 311 271, process_madvise 440 440, setpriority 141 140",
    "ioprio_set 251 30, flock 73 32, migrate_pages 256 238, move_pages 279 239, sched_setaffinity 203 122",
    "sched_setparam 142 118, sched_setscheduler 144 119, sched_setattr 314 274",
    # Memory that the limit on the address space does not see.
    "memfd_create 319 279, memfd_secret 447 447, shmget 29 194, msgget 68 186, semget 64 190, mq_open 240 180",
    # What others do with their files, and pages that move between a pipe and a process.
    "inotify_init 253 -, inotify_init1 294 26, splice 275 76, tee 276 77, vmsplice 278 75",
    # The kernel, and what a process sees of it.
    "bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, keyctl 250 219, add_key 248 217",
    "request_key 249 218, unshare 272 97, setns 308 268, mount 165 40, umount2 166 39, pivot_root 155 41",
    "chroot 161 51, open_by_handle_at 304 265, fanotify_init 300 262",
    # Changes of files.
    "chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -, lchown 94 -, fchown 93 55",
    "fchownat 260 54, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, setxattrat 463 463",
    "removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16, removexattrat 466 466",
    "file_setattr 469 469, utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, ioctl 16 29",
    "creat 85 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276, link 86 -",
    "linkat 265 37, symlink 88 -, symlinkat 266 36, mkdir 83 -, mkdirat 258 34, rmdir 84 -, mknod 133 -",
    "mknodat 259 33, truncate 76 45, ftruncate 77 46, fallocate 285 47",
)
_ABSENT = _calls("clone3 435 435, openat2 437 437")
"""Calls whose arguments a filter cannot read; the C library does without them."""
_CLONE, _PRLIMIT, _OPEN, _OPENAT, _FCNTL = (56, 220), (302, 261), (2, None), (257, 56), (72, 25)
_PRCTL, _SECCOMP = (157, 167), (317, 277)

_CLONE_THREAD = 0x10000
# Others make the kernel signal another process (F_SETOWN, F_SETSIG), hold up who writes a file, or enlarge a pipe.
_DESCRIPTOR_COMMANDS = (F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, F_GETFL, F_SETFL)
# Others would outlive the parent's death or let other processes of this user read this one's memory.
_PROCESS_OPTIONS = (libc.PR_SET_NAME, libc.PR_GET_NAME, libc.PR_SET_VMA)
_OPENS_TO_CHANGE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | (os.O_TMPFILE & ~os.O_DIRECTORY)

_LOAD, _JUMP_EQUAL, _JUMP_FROM, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO, _NOTIFY = 0x7FFF0000, 0x80000000, 0x00050000, 0x7FC00000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_X32_CALLS = 0x40000000


@cache
def is_available() -> bool:
    """Whether this kernel and processor have filters."""
    try:
        libc.prctl(_PR_GET_SECCOMP)
    except OSError:
        return False
    return os.uname().machine in _ARCHITECTURES


@cache
def can_hold_calls() -> bool:
    """Whether the kernel (Linux 5.5 and newer) lets another process decide on a call."""
    try:
        libc.syscall(call_number(), _GET_ACTION_AVAILABLE, 0, ctypes.byref(ctypes.c_uint32(_NOTIFY)))
    except OSError:
        return False
    return True


def call_number() -> int:
    """Of seccomp(2) here."""
    column, _ = _ARCHITECTURES[os.uname().machine]
    return _SECCOMP[column]


def restrict_calls(open_to_write: bool, hold_threads: bool) -> int | None:
    """Take from this thread, and all that it starts, what a program that only computes has no use for.

    Args:
        open_to_write: leave it that, because something else says which files.
        hold_threads: let whoever has the listener decide on each new thread.

    Returns:
        The listener, a descriptor, with `hold_threads`.
    """
    instructions = b"".join(_program(open_to_write, hold_threads))
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(instructions) // 8, ctypes.addressof(buffer)))
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    flags = _NEW_LISTENER if hold_threads else 0
    result = libc.syscall(call_number(), _SET_MODE_FILTER, flags, ctypes.byref(program))
    return result if hold_threads else None


def _program(open_to_write: bool, hold_threads: bool) -> list[bytes]:
    column, architecture = _ARCHITECTURES[os.uname().machine]
    program = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_JUMP_EQUAL, architecture, 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER),
        _instruction(_JUMP_FROM, _X32_CALLS, 0, 1),
        _instruction(_RETURN, _KILL),
    ]
    if not open_to_write:
        program += _unless(_OPEN[column], 1, _OPENS_TO_CHANGE, allowed_if_set=False)
        program += _unless(_OPENAT[column], 2, _OPENS_TO_CHANGE, allowed_if_set=False)
    for calls, error in ((_REFUSED, errno.EACCES), (_ABSENT, errno.ENOSYS)):
        for numbers in calls:
            program += _refuse(numbers[column], error)
    program += _unless(_CLONE[column], 0, _CLONE_THREAD, allowed_if_set=True)
    if hold_threads:
        program += [_instruction(_JUMP_EQUAL, _CLONE[column], 0, 1), _instruction(_RETURN, _NOTIFY)]
    program += _only(_FCNTL[column], 1, _DESCRIPTOR_COMMANDS)
    program += _only(_PRCTL[column], 0, _PROCESS_OPTIONS)
    # Limits of this process alone: its number here is 0.
    program += _unless(_PRLIMIT[column], 0, 0xFFFFFFFF, allowed_if_set=False)
    return [*program, _instruction(_RETURN, _ALLOW)]


def _refuse(number: int | None, error: int) -> list[bytes]:
    if number is None:
        return []
    return [_instruction(_JUMP_EQUAL, number, 0, 1), _instruction(_RETURN, _ERRNO | error)]


def _unless(number: int | None, argument: int, bits: int, allowed_if_set: bool) -> list[bytes]:
    """Refuse a call by whether any of some bits of an argument is set."""
    if number is None:
        return []
    return [
        _instruction(_JUMP_EQUAL, number, 0, 4),
        _instruction(_LOAD, _ARGUMENTS + 8 * argument),
        _instruction(_JUMP_SET, bits, int(allowed_if_set), int(not allowed_if_set)),
        _instruction(_RETURN, _ERRNO | errno.EACCES),
        _instruction(_LOAD, _NUMBER),
    ]


def _only(number: int, argument: int, values: Sequence[int]) -> list[bytes]:
    """Refuse a call unless an argument, of 32 bits, is one of some values."""
    return [
        _instruction(_JUMP_EQUAL, number, 0, len(values) + 3),
        _instruction(_LOAD, _ARGUMENTS + 8 * argument),
        *(_instruction(_JUMP_EQUAL, value, len(values) - i, 0) for i, value in enumerate(values)),
        _instruction(_RETURN, _ERRNO | errno.EACCES),
        _instruction(_LOAD, _NUMBER),
    ]


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)
