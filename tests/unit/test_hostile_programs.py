"""Hundreds of hostile programs among honest ones: these come out as they always do, in every form of the sandbox."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path

import pytest
from sandbox_attacks import (
    BURST,
    CYCLE,
    MAP_SCAN,
    PEEK,
    SCAN,
    SECRET,
    STAY,
    TAKE_BACK,
    WATCH,
    descendants,
)

from xbai.grading import GradeRequest, GraderPool
from xbai.sandbox.job import Job, Limits, Outcome, Status
from xbai.sandbox.process import Sandbox

PREAMBLE = "import array, ctypes, fcntl, gc, mmap, os, resource, signal, socket, sys, threading, time\n"
HOSTILE = {
    "earlier answers on the heap": SCAN,
    "earlier answers among the objects": MAP_SCAN,
    "earlier answers in the garbage": "print([o for o in gc.get_objects() if isinstance(o, str) and 'seven' in o])",
    "output taken back": TAKE_BACK,
    "descriptors in a circle": CYCLE,
    "life after the owner": STAY,
    "a burst of bare threads": BURST,
    "a burst of threads": "while True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "memory of others": PEEK.format(processes="(1, os.getppid())"),
    "memory of its own": "open('/proc/self/mem', 'r+b').write(b'x')",
    "watching folders": WATCH,
    "a fork bomb": "while True: os.fork()",
    "a fork by its number": "print(ctypes.CDLL(None).syscall(57))",
    "another program": "os.execv('/bin/sh', ['sh', '-c', 'echo 6'])",
    "an endless loop": "while True: pass",
    "a long sleep": "time.sleep(600)",
    "deaf to signals": "for n in (1, 2, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
    "its output closed": "os.close(1)\ntime.sleep(600)",
    "all closed": "os.closerange(0, 4096)\ntime.sleep(600)",
    "8 GB at once": "x = bytearray(8 * 2**30)",
    "memory piece by piece": "x = []\nwhile True: x.append(bytearray(2**24))",
    "mapped memory": "x = [mmap.mmap(-1, 2**28) for _ in range(64)]\nfor m in x: m[::4096] = bytes(2**16)",
    "more memory asked for": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "a gigabyte of output": "while True: print('x' * 2**20)",
    "a gigabyte of complaints": "while True: sys.stderr.write('x' * 2**20)",
    "a segmentation fault": "ctypes.string_at(0)",
    "an abort": "os.abort()",
    "a stack without end": "sys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "a number without end": "print(10**10**9)",
    "signals to its parent": "os.kill(os.getppid(), 9)",
    "signals to all": "os.kill(-1, 9)",
    "a signal to itself": "os.kill(os.getpid(), 9)",
    "stopped by itself": "os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(600)",
    "files written": "for folder in ('.', '/tmp', '/dev/shm', '/etc'): open(folder + '/evil', 'w')",
    "files read": "print(open('/etc/shadow').read())",
    "a network": "socket.create_connection(('127.0.0.1', 22), 1)",
    "a socket of this machine": "socket.socket(socket.AF_UNIX).connect('/run/systemd/private')",
    "buffers of sockets": "x = [socket.socketpair() for _ in range(9999)]",
    "pipes without end": "x = [os.pipe() for _ in range(9999)]",
    "a file in memory": "os.memfd_create('x')",
    "namespaces": "print(ctypes.CDLL(None).unshare(0x10000000))\nos.chroot('/')",
    "tracing its parent": "print(ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0))",
    "no text": "sys.stdout.buffer.write(bytes(range(256)) * 99)",
    "no source": "\0",
}
FAST = Limits(cpu_s=1, wall_s=1.5, memory_bytes=2**29, threads=8)
ROUNDS = 4
HONEST = "numbers = list(map(int, input().split()))\nprint(sum(numbers))"
RUNNING_OVER_S = 30.0
"""On a busy machine; what hangs sleeps for ten minutes."""


@pytest.mark.long
def test_an_honest_program_after_each_hostile_one(sandbox: Sandbox):
    rng = random.Random(0)
    started = None
    for _ in range(ROUNDS):
        for kind in rng.sample(list(HOSTILE), len(HOSTILE)):
            begun = time.monotonic()
            hostile = sandbox.run(Job(PREAMBLE + HOSTILE[kind], stdin="1 2 3", limits=FAST))
            assert time.monotonic() - begun < FAST.wall_s + RUNNING_OVER_S, kind
            assert SECRET.encode() not in hostile.output, kind
            numbers = [rng.randrange(10**6) for _ in range(9)]
            honest = sandbox.run(Job(f"# {SECRET}\n{HONEST}", stdin=" ".join(map(str, numbers))))
            assert honest == Outcome(Status.DONE, f"{sum(numbers)}\n".encode()), kind
        # Between two rounds its processes are those that it began with.
        started = started or sorted(descendants(sandbox._process.pid))
        assert sorted(descendants(sandbox._process.pid)) == started
    assert not any(Path(folder, "evil").exists() for folder in (".", "/tmp", "/dev/shm", "/etc", "/"))


@pytest.mark.long
def test_grades_are_right_among_hostile_programs(monkeypatch: pytest.MonkeyPatch):
    """Two at a time: what one does shows in the other's grade, if it shows anywhere."""
    rng = random.Random(0)
    requests, expected = [], []
    for kind in rng.sample(list(HOSTILE), len(HOSTILE)) * 2:
        numbers = [rng.randrange(10**6) for _ in range(9)]
        tests = json.dumps({"tests": [{"input": " ".join(map(str, numbers)), "output": str(sum(numbers))}]})
        for code, grade in ((PREAMBLE + HOSTILE[kind], 0.0), (HONEST, 1.0), (HONEST.replace("sum", "max"), 0.0)):
            requests.append(GradeRequest("livecodebench", f"```python\n{code}\n```", tests))
            expected.append(grade)
    threads = threading.active_count()
    with GraderPool(2) as pool:
        assert pool.grade(requests) == expected
        assert pool.failures == {}
    assert threading.active_count() <= threads
