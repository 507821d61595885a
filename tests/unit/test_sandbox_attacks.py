"""Attacks on the sandbox, as this user and, where this one is root, as an ordinary one."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import sandbox_attacks
from clocks import wait_until
from sandbox_attacks import ATTACKS, FORMS, descendants

from xbai.sandbox import forking
from xbai.sandbox.forking import patiently

NOBODY = 65534
SYSTEM_PYTHON = "/usr/bin/python3"


@pytest.mark.parametrize("attack", ATTACKS)
def test_it_gains_nothing(sandbox, attack):
    if attack == "memory_of_other_processes" and os.getuid() != 0:
        pytest.skip("this process, unlike a grader, lets its user's others read it")
    if attack == "a_burst_of_threads" and "before Linux 5.5" in sandbox.warning:
        pytest.skip(sandbox.warning)
    ATTACKS[attack](sandbox)


@pytest.mark.parametrize("form", FORMS)
def test_it_gains_nothing_as_an_ordinary_user(form):
    if os.getuid() != 0:
        pytest.skip("this is one")
    script = Path(sandbox_attacks.__file__)
    identity = {"user": NOBODY, "group": NOBODY, "extra_groups": [], "cwd": "/"}
    version = [SYSTEM_PYTHON, "-c", f"import sys; open({str(script)!r}); sys.exit(sys.version_info < (3, 11))"]
    try:
        subprocess.run(version, check=True, capture_output=True, **identity)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"an ordinary user has no Python 3.11 at {SYSTEM_PYTHON}, or cannot read this repository")
    done = subprocess.run([SYSTEM_PYTHON, script, form], capture_output=True, text=True, timeout=120, **identity)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["failures"] == {}


OWNER = """
import sys
sys.path[:0] = {path!r}
from sandbox_attacks import FORMS, STAY, run
with FORMS[{form!r}]() as sandbox:
    sandbox.start()
    print(flush=True)
    run(sandbox, STAY, wall_s=600.0)
"""


@pytest.mark.parametrize("whose", ["owner", "harness"])
@pytest.mark.parametrize("form", ["landlock", "seccomp"])
def test_nothing_outlives_the_sandbox(form, whose):
    path = [str(Path(sandbox_attacks.__file__).parent)]
    with subprocess.Popen([sys.executable, "-c", OWNER.format(path=path, form=form)], stdout=subprocess.PIPE) as owner:
        owner.stdout.readline()
        wait_until(lambda: len(list(descendants(owner.pid))) == 2, "there are harness and program")
        # Until the program sleeps.
        time.sleep(0.5)
        processes = set(descendants(owner.pid))
        (harness,) = (child.pid for child in psutil.Process(owner.pid).children())
        victim = harness if whose == "harness" else owner.pid
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: not any(map(is_running, processes - {victim})), "the other processes end")
        owner.kill()


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_patience_has_an_end(monkeypatch):
    monkeypatch.setattr(forking, "PATIENCE_S", 0.1)
    tries = []

    def start() -> None:
        tries.append(time.monotonic())
        raise BlockingIOError(errno.EAGAIN, "no room")

    with pytest.raises(BlockingIOError):
        patiently(start)
    assert len(tries) > 2
