"""Putting the running process behind walls, for good."""

from __future__ import annotations

import os
import resource
import signal
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from xbai.sandbox import landlock, libc, seccomp
from xbai.sandbox.job import MEBIBYTE, Limits

STACK_BYTES = 128 * MEBIBYTE
_OPEN_FILES = 64
_SYSTEM_PATHS = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero")


@dataclass(frozen=True)
class Walls:
    """Which walls beyond the filter on system calls stand; see `Sandbox` for how they are chosen."""

    landlock: bool
    """Which files may be used."""
    held_threads: bool
    """Each new thread waits for the supervisor, who counts."""


@cache
def python_paths() -> tuple[Path, ...]:
    """What a Python program needs to read: the interpreter, its libraries and the system's."""
    paths = [*map(Path, _SYSTEM_PATHS), Path(sys.base_prefix), Path(sys.prefix)]
    return tuple(dict.fromkeys(path for path in paths if path.exists()))


def hide_memory() -> None:
    """Keep other processes of this user from reading this one's memory through /proc or by ptrace(2).

    Where there is no such call, no programs are run either.
    """
    if sys.platform == "linux":
        libc.prctl(libc.PR_SET_DUMPABLE, 0)


def die_with(parent: int) -> None:
    """End this process, which `parent` has forked, when that one ends."""
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def confine(limits: Limits, walls: Walls) -> int | None:
    """Keep this process, from here on, to its limits, and from changing anything outside of itself.

    Returns, with `walls.held_threads`, the listener for `let_pass`.
    """
    _limit(resource.RLIMIT_CPU, limits.cpu_s)
    _limit(resource.RLIMIT_AS, limits.memory_bytes)
    # No file that is open already grows.
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_STACK, STACK_BYTES)
    _limit(resource.RLIMIT_NOFILE, _OPEN_FILES)
    _limit(resource.RLIMIT_CORE, 0)
    libc.drop_capabilities()
    # Landlock keeps other processes from this one's memory. It would also read its standard input by name.
    libc.prctl(libc.PR_SET_DUMPABLE, int(walls.landlock))
    if walls.landlock:
        landlock.restrict_files(python_paths())
    return seccomp.restrict_calls(open_to_write=walls.landlock, hold_threads=walls.held_threads)


def _limit(kind: int, amount: int) -> None:
    hard = resource.getrlimit(kind)[1]
    amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    resource.setrlimit(kind, (amount, amount))
