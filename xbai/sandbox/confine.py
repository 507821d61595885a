"""Putting the running process behind walls, for good."""

from __future__ import annotations

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


@cache
def python_paths() -> tuple[Path, ...]:
    """What a Python program needs to read: the interpreter, its libraries and the system's."""
    paths = [*map(Path, _SYSTEM_PATHS), Path(sys.base_prefix), Path(sys.prefix)]
    return tuple(dict.fromkeys(path for path in paths if path.exists()))


def confine(limits: Limits, walls: Walls) -> None:
    """Keep this process, from here on, to its limits, and from changing anything outside of itself."""
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    _limit(resource.RLIMIT_CPU, limits.cpu_s)
    _limit(resource.RLIMIT_AS, limits.memory_bytes)
    # No file that is open already grows.
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_STACK, STACK_BYTES)
    _limit(resource.RLIMIT_NOFILE, _OPEN_FILES)
    _limit(resource.RLIMIT_CORE, 0)
    libc.drop_capabilities()
    if walls.landlock:
        landlock.restrict_files(python_paths())
    seccomp.restrict_calls(open_to_write=walls.landlock)


def _limit(kind: int, amount: int) -> None:
    hard = resource.getrlimit(kind)[1]
    amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    resource.setrlimit(kind, (amount, amount))
