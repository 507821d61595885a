"""What submitted code can do to this machine: nothing; in every form of the sandbox that works here."""

import fcntl
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from xbai.sandbox import process
from xbai.sandbox.job import MEBIBYTE, Job, Limits, Status
from xbai.sandbox.process import Sandbox, SandboxError

F_SETOWN_EX, FIOSETOWN = 15, 0x8901


def run(sandbox, code, **limits):
    return sandbox.run(Job(code, limits=Limits(**limits)))


def printed(sandbox, code, stdin=""):
    outcome = sandbox.run(Job(code, stdin=stdin))
    assert outcome.status is Status.DONE
    return outcome.output.decode()


def refused(sandbox, *statements):
    """Whether each statement fails with an error of the operating system."""
    code = "import fcntl, os, socket, signal, threading\n" + "".join(
        f"try:\n    {statement}\n    print({statement!r})\nexcept OSError:\n    pass\n" for statement in statements
    )
    return printed(sandbox, code) == ""


def test_programs_read_and_print(sandbox):
    assert printed(sandbox, "print(input()[::-1])", "déf\n") == "féd\n"
    assert printed(sandbox, "print(open(0).read())", "a\n\nb") == "a\n\nb\n"
    assert printed(sandbox, "import sys\nfor line in sys.stdin.buffer: print(line)", "a\nb") == "b'a\\n'\nb'b'\n"
    assert printed(sandbox, "print(1); exit()") == "1\n"
    assert printed(sandbox, "if __name__ == '__main__': print(gcd(6, 4), Counter('aa')['a'])") == "2 2\n"
    code = "setrecursionlimit(99); print(maxsize == sys.maxsize, loads('[1]'), StringIO('a').read(), stdin.readline())"
    assert printed(sandbox, code, "b") == "True [1] a b\n"
    assert (
        printed(sandbox, "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nprint(A(1))")
        == "A(x=1)\n"
    )


def test_what_programs_may_use_hides_no_builtin(sandbox):
    code = "import builtins\nprint([n for n, v in vars(builtins).items() if n[0] != '_' and globals()[n] is not v])"
    assert printed(sandbox, code) == "[]\n"


def test_functions_are_called_and_what_they_print_is_ignored(sandbox):
    code = "class Solution:\n    def f(self, x: List[int]):\n        print('noise'); return x, sum(x)"
    assert json.loads(sandbox.run(Job(code, function="f", arguments=[[1, 2]])).output) == [[1, 2], 3]
    assert sandbox.run(Job("def f(): return 7", function="f")).output == b"7"
    assert sandbox.run(Job("def g(): return 7", function="f")).status is Status.ERROR
    assert sandbox.run(Job("def f(): return {1}", function="f")).status is Status.ERROR


def test_results_of_numpy_are_plain_and_numpy_comes_only_with_the_program(sandbox):
    code = "import numpy as np\ndef f(x): return np.arange(x), np.bool_(True), {'a': [np.float32(0.5)]}"
    assert json.loads(sandbox.run(Job(code, function="f", arguments=[2])).output) == [[0, 1], True, {"a": [0.5]}]
    fails = "import sys\nclass A: tolist = item = lambda self: 1\ndef f(): return 'numpy' in sys.modules or A()"
    assert sandbox.run(Job(fails, function="f")).status is Status.ERROR
    assert json.loads(sandbox.run(Job(fails.replace("A()", "0"), function="f")).output) == 0


@pytest.mark.parametrize("value", ["self", "[self]", "1 / 0", "any(iter(int, 1))", "exit(0)"])
def test_what_poses_as_numpy_gains_nothing(sandbox, value):
    code = (
        "import sys\nclass A:\n    generic = ndarray = property(lambda self: A)\n"
        f"    def tolist(self): return {value}\nsys.modules['numpy'] = A()\ndef f(): return A()"
    )
    outcome = sandbox.run(Job(code, function="f", limits=Limits(cpu_s=1)))
    assert outcome.status in (Status.ERROR, Status.TIME)


@pytest.mark.parametrize(
    "code", ["1/0", "raise ValueError", "def", "import os; os._exit(3)", "import os; os.abort()", "\0"]
)
def test_a_program_that_fails(sandbox, code):
    assert run(sandbox, code).status is Status.ERROR


def test_deep_recursion_on_a_large_stack(sandbox):
    code = (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**27)\n"
        "@functools.cache\ndef f(n): return n and 1 + f(n - 1)\n"
        "threading.Thread(target=lambda: print(f(50000))).start()"
    )
    assert printed(sandbox, code) == "50000\n"


def test_runs_know_nothing_of_each_other(sandbox):
    printed(sandbox, "import builtins, math; builtins.secret = math.secret = 1")
    assert printed(sandbox, "import builtins, math\nprint(hasattr(builtins, 'secret'), hasattr(math, 'secret'))") == (
        "False False\n"
    )


def test_an_endless_loop(sandbox):
    started = time.monotonic()
    assert run(sandbox, "while True: pass", cpu_s=1).status is Status.TIME
    assert run(sandbox, "import time; time.sleep(60)", wall_s=0.5).status is Status.TIME
    assert run(sandbox, "import os, time\nos.close(1)\ntime.sleep(60)", wall_s=0.5).status is Status.TIME
    stubborn = "import signal\nfor n in (1, 2, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass"
    assert run(sandbox, stubborn, cpu_s=1).status is Status.TIME
    assert time.monotonic() - started < 45


def test_a_fork_bomb(sandbox):
    assert refused(sandbox, "os.fork()", "os.forkpty()", "os.posix_spawn('/bin/true', ['true'], {})", "os.setsid()")
    assert refused(sandbox, "os.execv('/bin/sh', ['sh', '-c', 'echo'])")
    assert run(sandbox, "import os\nwhile True:\n    os.fork()").status is Status.ERROR
    threads = (
        "import threading, time\nthreading.stack_size(2**15)\n"
        "while True: threading.Thread(target=time.sleep, args=(9,)).start()"
    )
    assert run(sandbox, threads).status in (Status.THREADS, Status.ERROR, Status.MEMORY)
    assert printed(sandbox, "print('still here')") == "still here\n"


def test_an_8_gb_allocation(sandbox):
    assert run(sandbox, "x = bytearray(8 * 2**30)").status is Status.MEMORY
    assert run(sandbox, "x = []\nwhile True: x.append(bytearray(2**24))", memory_bytes=2**29).status is Status.MEMORY
    assert refused(sandbox, "os.memfd_create('x')")


def test_no_file_is_changed(sandbox, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious", encoding="utf-8")
    victim.chmod(0o666)
    tmp_path.chmod(0o777)
    tmp_path.joinpath("mine").touch()
    before = victim.stat(), sorted(tmp_path.iterdir())
    writable = (tmp_path, tempfile.gettempdir(), "/tmp", "/dev/shm", "/etc", "/usr", "/proc/self", ".", "..")
    assert refused(
        sandbox,
        *(f"open('{folder}/evil', 'a')" for folder in writable),
        *(f"os.mkdir('{folder}/evil')" for folder in writable),
        f"open({str(victim)!r}, 'a')",
        f"os.unlink({str(victim)!r})",
        f"os.truncate({str(victim)!r}, 0)",
        f"os.rename({str(victim)!r}, {str(tmp_path / 'mine')!r})",
        f"os.link({str(victim)!r}, {str(tmp_path / 'evil')!r})",
        f"os.symlink('x', {str(tmp_path / 'evil')!r})",
        f"os.chmod({str(victim)!r}, 0)",
        f"os.utime({str(victim)!r})",
        f"os.open({str(victim)!r}, os.O_RDONLY | os.O_TRUNC)",
        # Its standard input is a file in memory.
        "os.write(0, b'x')",
        "os.ftruncate(0, 2**30)",
        "fcntl.flock(0, fcntl.LOCK_EX)",
        "fcntl.fcntl(0, fcntl.F_SETLEASE, fcntl.F_RDLCK)",
    )
    after = victim.stat(), sorted(tmp_path.iterdir())
    assert victim.read_text(encoding="utf-8") == "precious"
    assert [(stat.st_mode, stat.st_mtime_ns, files) for stat, files in (before, after)] == [
        (before[0].st_mode, before[0].st_mtime_ns, before[1])
    ] * 2


def test_the_null_device(sandbox):
    if sandbox.form == "seccomp":
        assert refused(sandbox, "open(os.devnull, 'w')")
    else:
        assert printed(sandbox, "import os\nprint('debug', file=open(os.devnull, 'w'))\nprint(1)") == "1\n"


def test_files_of_others_are_not_read(sandbox, tmp_path):
    if sandbox.form == "seccomp":
        assert "can read (not write) this machine's files" in sandbox.warning
        return
    secret = tmp_path / "secret"
    secret.write_text("answers", encoding="utf-8")
    assert refused(sandbox, f"open({str(secret)!r})", "open('/etc/passwd')", f"os.listdir({str(Path.home())!r})")
    assert refused(sandbox, f"open('/proc/{os.getpid()}/environ')", "open('/proc/self/mem')")


def test_a_network_call(sandbox):
    families = ("AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK")
    assert refused(sandbox, *(f"socket.socket(socket.{family})" for family in families))
    assert refused(sandbox, "socket.create_connection(('127.0.0.1', 22), 1)")


def test_signals_to_others(sandbox):
    assert refused(sandbox, "os.kill(os.getppid(), 0)", f"os.kill({os.getpid()}, 0)", "os.killpg(0, signal.SIGTERM)")
    assert refused(sandbox, "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)", "os.pidfd_open(os.getppid())")
    # A pipe tells its owner, by any signal, when there is something to read; see fcntl(2).
    victim = subprocess.Popen(["sleep", "60"])
    own = [f"fcntl.fcntl(os.pipe()[0], {command}, {victim.pid})" for command in (fcntl.F_SETOWN, F_SETOWN_EX)]
    assert refused(sandbox, *own, "fcntl.fcntl(os.pipe()[0], fcntl.F_SETSIG, 9)")
    assert refused(sandbox, f"fcntl.ioctl(os.pipe()[0], {FIOSETOWN}, bytes(4))")
    signals = (
        "import fcntl, os\nr, w = os.pipe()\n"
        f"for command, value in ((fcntl.F_SETOWN, {victim.pid}), (fcntl.F_SETSIG, 9), (fcntl.F_SETFL, os.O_ASYNC)):\n"
        "    try: fcntl.fcntl(r, command, value)\n    except OSError: pass\nos.write(w, b'x')"
    )
    assert printed(sandbox, signals) == ""
    with pytest.raises(subprocess.TimeoutExpired):
        victim.wait(0.2)
    victim.kill()
    victim.wait()


def test_descriptors_are_still_used(sandbox):
    code = (
        "import fcntl, os\nr, w = os.pipe()\n"
        "os.set_inheritable(r, True)\nfcntl.fcntl(r, fcntl.F_SETFL, os.O_NONBLOCK)\n"
        "print(os.get_blocking(r), os.get_inheritable(r), fcntl.fcntl(os.dup(w), fcntl.F_GETFL) & os.O_ACCMODE)"
    )
    assert printed(sandbox, code) == "False True 1\n"


def test_privileges_and_environment(sandbox, monkeypatch):
    assert refused(sandbox, "os.setuid(12345)", "os.chroot('/')", "os.mkfifo('pipe')")
    assert "PYTHONPATH" not in printed(sandbox, "import os; print(*os.environ)")
    assert printed(sandbox, "import os; print(os.getcwd())") == "/\n"
    assert printed(sandbox, "print(sys.argv, sorted(map(int, [f for f in '012'])))") == "['solution.py'] [0, 1, 2]\n"
    leaked = "import os\nfor n in range(3, 100):\n    try: os.fstat(n); print(n)\n    except OSError: pass"
    assert printed(sandbox, leaked) in ("", "3\n")


def test_a_gigabyte_of_output(sandbox):
    assert run(sandbox, "while True: print('x' * 2**20)").status is Status.OUTPUT
    assert run(sandbox, "print('x' * 2**21)", output_bytes=MEBIBYTE).status is Status.OUTPUT
    assert len(run(sandbox, "print('x' * 2**21)").output) == 2**21 + 1


def test_output_that_is_no_text(sandbox):
    code = "import sys; sys.stdout.buffer.write(bytes(range(256)))"
    assert run(sandbox, code).output == bytes(range(256))


def test_a_sandbox_that_dies_is_replaced():
    with Sandbox() as sandbox:
        sandbox.start()
        os.kill(sandbox._process.pid, signal.SIGKILL)
        assert run(sandbox, "print(1)").output == b"1\n"


def test_a_job_that_ends_every_sandbox_has_failed():
    with Sandbox() as sandbox:
        # The harness cannot compare with this.
        assert run(sandbox, "print(1)", output_bytes=None).status is Status.ERROR
        assert run(sandbox, "print(1)").output == b"1\n"


@pytest.mark.parametrize(("code", "complaint"), [("exit('no luck')", "no luck"), ("pass", "status 0")])
def test_a_sandbox_that_runs_nothing_is_no_jobs_failure(monkeypatch, code, complaint):
    monkeypatch.setattr(process, "_CODE", code)
    with Sandbox() as sandbox, pytest.raises(SandboxError, match=complaint):
        run(sandbox, "print(1)")


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with Sandbox(use_landlock=False) as sandbox:
        sandbox.start()
    assert "bubblewrap is not installed; the kernel has no Landlock" in sandbox.warning


def test_a_bubblewrap_that_does_not_work_here_is_named(tmp_path, monkeypatch):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions' >&2\nexit 1\n", encoding="utf-8")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with Sandbox() as sandbox:
        assert run(sandbox, "print(1)").output == b"1\n"
    assert "bubblewrap does not work here (bwrap: No permissions)" in sandbox.warning
