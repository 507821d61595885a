"""What programs have tried against the sandbox. Also a program of its own, for another user's Python:

    python tests/unit/sandbox_attacks.py FORM

runs all of them, and says on standard output which got through.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from xbai.sandbox.confine import hide_memory
from xbai.sandbox.job import Job, Limits, Outcome, Status
from xbai.sandbox.process import Sandbox

FORMS = {
    "bubblewrap": Sandbox,
    "landlock": lambda: Sandbox(bubblewrap=False),
    "seccomp": lambda: Sandbox(bubblewrap=False, use_landlock=False),
}
THREADS = 8

SECRET = "a solution, " + "which nobody else knows: " + "seven times six"
SCAN = r"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.sbrk.restype = ctypes.c_void_p
r, w = os.pipe()
address, pages = (libc.sbrk(0) & ~4095) - 4096, []
while libc.write(w, ctypes.c_void_p(address), 4096) > 0:
    pages.append(os.read(r, 4096))
    address -= 4096
memory = b"".join(reversed(pages))
print(len(memory) > 2**16, memory.count(bytes(reversed(b"swonk esle ydobon hcihw"))))
"""
"""Reads the heap page by page: a write to a pipe fails where there is no page, and harms nothing."""
MAP_SCAN = r"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
r, w = os.pipe()
found, seen, near = 0, 0, id(os) & ~4095
for address in range(near - 2**24, near + 2**24, 4096):
    if libc.write(w, ctypes.c_void_p(address), 4096) > 0:
        page = os.read(r, 4096)
        seen += 1
        found += page.count(bytes(reversed(b"swonk esle ydobon hcihw")))
print(seen > 16, found)
"""
"""The same around where Python keeps its objects."""
TAKE_BACK = r"""
import os, threading
def take():
    while True:
        try: os.read(back, 1)
        except BlockingIOError: pass
back = os.open("/proc/self/fd/1", os.O_RDONLY | os.O_NONBLOCK)
threading.Thread(target=take, daemon=True).start()
while True: os.write(1, b"x")
"""
CYCLE = r"""
import array, os, socket
a, b = socket.socketpair()
def send(via, *descriptors):
    via.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])
send(a, b.fileno(), 1)
send(b, a.fileno(), 1)
os.write(1, b"wrong answer")
os._exit(0)
"""
STAY = r"""
import ctypes, time
print(ctypes.CDLL(None).prctl(1, 0, 0, 0, 0), flush=True)
time.sleep(600)
"""
BURST = r"""
import ctypes, mmap, time
libc = ctypes.CDLL(None, use_errno=True)
pause = ctypes.cast(libc.pause, ctypes.c_void_p)
stacks = mmap.mmap(-1, 2**26)
base = ctypes.addressof(ctypes.c_char.from_buffer(stacks))
for number in range(1, 4000):
    libc.clone(pause, ctypes.c_void_p(base + 16384 * number), 0x10000 | 0x800 | 0x400 | 0x200 | 0x100 | 0x40000, None)
time.sleep(0.3)
"""
PEEK = r"""
import os
for process in {processes}:
    for name in ("mem", "environ", "maps"):
        try:
            with open(f"/proc/{{process}}/{{name}}", "rb") as stream:
                print(process, name, len(stream.read(1)) if name != "mem" else "open")
        except OSError:
            pass
"""
WATCH = r"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.inotify_init1(0), libc.inotify_init())
"""


def run(sandbox: Sandbox, code: str, **limits: float) -> Outcome:
    return sandbox.run(Job(code, limits=Limits(**limits)))


def memory_of_earlier_jobs(sandbox: Sandbox) -> None:
    """Earlier programs, what they read and what they printed are in no later one's memory."""
    for _ in range(3):
        earlier = Job(f"# {SECRET}\nprint(input())\n" + "x = 1\n" * 50, stdin=SECRET * 20)
        assert sandbox.run(earlier).status is Status.DONE
        for scan in (SCAN, MAP_SCAN):
            outcome = run(sandbox, scan)
            assert outcome.output == b"True 0\n", outcome


def output_taken_back(sandbox: Sandbox) -> None:
    """A program that reads its own output holds nobody up."""
    started = time.monotonic()
    outcome = run(sandbox, TAKE_BACK, wall_s=1.0)
    assert outcome.status is not Status.DONE
    assert time.monotonic() - started < 60


def descriptors_in_a_circle(sandbox: Sandbox) -> None:
    """Nor does one whose output is kept open by sockets in each other's queues."""
    started = time.monotonic()
    assert run(sandbox, CYCLE, wall_s=20.0).status is Status.ERROR
    assert time.monotonic() - started < 60


def life_after_the_owner(sandbox: Sandbox) -> None:
    """A program cannot opt out of ending with who runs it."""
    outcome = run(sandbox, STAY.replace("600", "0"))
    assert outcome.output == b"-1\n", outcome


def a_burst_of_threads(sandbox: Sandbox) -> None:
    """Threads over the limit never come into being: others of this user would lack theirs."""
    most, is_over = 0, threading.Event()

    def count() -> None:
        nonlocal most
        while not is_over.is_set():
            most = max([most, *(threads_of(process) for process in descendants(sandbox._process.pid))])

    watcher = threading.Thread(target=count)
    watcher.start()
    try:
        outcome = run(sandbox, BURST, threads=THREADS)
    finally:
        is_over.set()
        watcher.join()
    assert outcome.status is Status.THREADS, outcome
    assert most <= THREADS, f"{most} threads at a time"


def memory_of_other_processes(sandbox: Sandbox) -> None:
    """Harness, supervisor and owner keep what they know to themselves."""
    processes = [os.getpid(), sandbox._process.pid, *descendants(sandbox._process.pid)]
    outcome = run(sandbox, PEEK.format(processes=processes).replace("in [", "in [os.getppid(), ", 1))
    assert (outcome.status, outcome.output) == (Status.DONE, b""), outcome


def files_that_others_use(sandbox: Sandbox) -> None:
    """Nobody is told of what happens in a folder."""
    assert run(sandbox, WATCH).output == b"-1 -1\n"


def no_room_for_a_process(sandbox: Sandbox) -> None:
    """Where this user may start no process for a while, a job waits, and is then run. (Root always may.)"""
    processes = [sandbox._process.pid, *descendants(sandbox._process.pid)]

    def allow(amount: int) -> None:
        for process in processes:
            with suppress(ProcessLookupError):
                resource.prlimit(process, resource.RLIMIT_NPROC, (amount, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_NPROC)
    later = threading.Timer(0.5, allow, [limits[0]])
    allow(1)
    started = time.monotonic()
    later.start()
    assert run(sandbox, "print(1)") == Outcome(Status.DONE, b"1\n")
    later.join()
    assert os.getuid() == 0 or time.monotonic() - started > 0.4, "it had room"


ATTACKS: dict[str, Callable[[Sandbox], None]] = {
    attack.__name__: attack
    for attack in (
        memory_of_earlier_jobs,
        output_taken_back,
        descriptors_in_a_circle,
        life_after_the_owner,
        a_burst_of_threads,
        memory_of_other_processes,
        files_that_others_use,
        no_room_for_a_process,
    )
}


def descendants(process: int) -> Iterator[int]:
    """Processes that `process` has started, and theirs."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = {process}
    while added := {child for child, parent in parents.items() if parent in found} - found:
        found |= added
    return iter(found - {process})


def threads_of(process: int) -> int:
    try:
        return sum(1 for _ in Path(f"/proc/{process}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return 0


def main(form: str) -> None:
    """Run every attack as this user."""
    # As a grader does.
    hide_memory()
    failures = {}
    with FORMS[form]() as sandbox:
        sandbox.start()
        for name, attack in ATTACKS.items():
            try:
                attack(sandbox)
            except AssertionError as error:
                failures[name] = str(error)
    json.dump({"warning": sandbox.warning, "failures": failures}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
