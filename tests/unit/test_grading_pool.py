"""The pool's promise: whatever happens while one response is graded costs that response its grade, nothing else."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from pathlib import Path

import pytest
from clocks import wait_until

from xbai.errors import UserError
from xbai.grading import CustomGrader, GradeRequest, GraderPool, pool
from xbai.grading.dispatch import Grade, Preparation
from xbai.sandbox import forking

HOSTILE = """
import os, subprocess, sys, time

def compute_score(data_source, solution_str, ground_truth, extra_info):
    if solution_str == "hang":
        while True:
            pass
    if solution_str == "exit":
        os._exit(3)
    if solution_str == "segfault":
        import ctypes
        ctypes.string_at(0)
    if solution_str == "bomb":
        chunks = []
        while True:
            chunks.append(bytearray(2**24))
    if solution_str == "raise":
        raise ValueError("no such luck")
    if solution_str == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open(extra_info["pid_file"], "w") as stream:
            stream.write(str(child.pid))
        time.sleep(600)
    if solution_str == "modules":
        return {"score": float("torch" in sys.modules or "pytest" in sys.modules)}
    if solution_str == "fork":
        os.fork()
    if solution_str == "fork and answer later":
        if os.fork() == 0:
            time.sleep(1.0)
            return 0.0
        return 1.0
    if solution_str == "fork and fail":
        if os.fork() == 0:
            raise ValueError("in the copy")
        return 1.0
    if solution_str == "fork and leave the answer to the copy":
        if os.fork():
            os._exit(0)
        return 1.0
    if solution_str == "write":
        for descriptor in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2}:
            try:
                os.write(descriptor, b"\\x00\\x00\\x00\\x04none" * 2)
            except OSError:
                pass
    if solution_str == "reply again":
        from multiprocessing.connection import Connection
        import gc
        (connection,) = (each for each in gc.get_objects() if isinstance(each, Connection))
        connection.send((extra_info["number"], extra_info["reply"]))
        return 1.0
    if solution_str == "pid":
        return os.getpid()
    return float(solution_str == ground_truth)
"""


@pytest.fixture
def grader(tmp_path):
    path = tmp_path / "hostile.py"
    path.write_text(HOSTILE, encoding="utf-8")
    return CustomGrader(str(path))


def request(response, **extra_info):
    return GradeRequest("custom", response, "right", extra_info)


def process_is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_failure_costs_its_own_sample_only(grader):
    hostile = ["hang", "exit", "segfault", "bomb", "raise"]
    responses = [text for bad in hostile for text in ("right", bad, "wrong", "right")]
    with GraderPool(2, timeout_s=4.0, grader=grader, memory_bytes=2**28) as pool:
        grades = pool.grade([request(response) for response in responses])
    assert grades == [1.0, None, 0.0, 1.0] * len(hostile)
    assert pool.failures == {"timeout": 1, "crash": 2, "memory": 1, "error": 1}


FORKS = ["fork", "fork and answer later", "fork and fail"]


@pytest.mark.parametrize("fork", FORKS)
def test_a_grader_that_forks_shifts_no_grades(tmp_path, fork):
    path = tmp_path / "hostile.py"
    # What the function is asked for is what it is to return: any shift shows.
    path.write_text(HOSTILE.replace("float(solution_str == ground_truth)", "extra_info['grade']"), encoding="utf-8")
    requests = [request("plain" if number % 4 else fork, grade=float(number)) for number in range(40)]
    with GraderPool(2, timeout_s=20.0, grader=CustomGrader(str(path))) as pool:
        grades = pool.grade(requests)
        assert not pool.failures
    assert grades == [float(number) if number % 4 or fork == "fork" else 1.0 for number in range(40)]


def test_a_module_that_forks_when_it_is_imported_shifts_no_grades(tmp_path):
    path = tmp_path / "forks.py"
    path.write_text("import os\nos.fork()\n" + HOSTILE, encoding="utf-8")
    with GraderPool(2, timeout_s=20.0, grader=CustomGrader(str(path))) as pool:
        assert pool.grade([request("right"), request("wrong")] * 20) == [1.0, 0.0] * 20


@pytest.mark.parametrize("hostile", ["write", "fork and leave the answer to the copy"])
def test_a_reply_that_is_none_costs_its_sample_only(grader, hostile):
    with GraderPool(1, timeout_s=2.0, grader=grader) as pool:
        assert pool.grade([request(text) for text in ["right", hostile, "wrong", "right"]]) == [1.0, None, 0.0, 1.0]


def test_a_reply_to_another_request_is_no_grade(grader):
    with GraderPool(1, timeout_s=20.0, grader=grader) as pool:
        early = request("reply again", reply=[Grade(0.25)], number=1)
        assert pool.grade([request("wrong"), early, request("right"), request("right")]) == [0.0, 0.25, None, 1.0]
        assert pool.failures == {"crash": 1}


def test_order_is_kept_over_many_requests():
    requests = [GradeRequest("aime24", f"\\boxed{{{n}}}", n if n % 3 else n + 1) for n in range(600)]
    with GraderPool(2, timeout_s=20.0) as pool:
        assert pool.grade(requests) == [float(n % 3 != 0) for n in range(600)]
        assert not pool.failures


def test_submit_overlaps_with_other_work_and_processes_are_reused(grader):
    with GraderPool(1, timeout_s=20.0, grader=grader) as pool:
        futures = [pool.submit(request("pid")) for _ in range(5)]
        pids = {future.result().value for future in futures}
    assert len(pids) == 1
    assert not process_is_alive(int(pids.pop()))


def test_workers_import_neither_torch_nor_the_parents_main_module(grader):
    with GraderPool(1, timeout_s=20.0, grader=grader) as pool:
        assert pool.grade([request("modules")]) == [0.0]


def test_importing_grading_is_cheap():
    code = "import sys, xbai.grading; assert not {'torch', 'sympy', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_graders_children_die_with_it(grader, tmp_path):
    pid_file = tmp_path / "pid"
    with GraderPool(1, timeout_s=5.0, grader=grader) as pool:
        assert pool.grade([request("child", pid_file=str(pid_file))]) == [None]
        wait_until(lambda: not process_is_alive(int(pid_file.read_text(encoding="utf-8"))), "the child dies")


def test_workers_end_when_the_parent_is_killed(grader):
    code = (
        "import time; from xbai.grading import *; "
        f"pool = GraderPool(1, timeout_s=20.0, grader=CustomGrader({grader.path!r})); "
        "print(int(pool.grade([GradeRequest('custom', 'pid', '')])[0]), flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        assert process_is_alive(worker)
        os.kill(parent.pid, signal.SIGKILL)
    wait_until(lambda: not process_is_alive(worker), "the worker ends")


def test_user_errors_reach_the_caller(tmp_path):
    with GraderPool(1) as pool, pytest.raises(UserError, match="'sudoku'"):
        pool.grade([GradeRequest("sudoku", "", "")])
    (tmp_path / "empty.py").write_text("", encoding="utf-8")
    for path, complaint in [("missing.py", "is not a file"), ("empty.py", "defines no function compute_score")]:
        with (
            GraderPool(1, grader=CustomGrader(str(tmp_path / path))) as pool,
            pytest.raises(UserError, match=complaint),
        ):
            pool.grade([request("right")])


def test_close_twice_and_unused():
    pool = GraderPool(2)
    pool.close()
    pool.close()


def test_a_process_that_does_not_start_costs_its_sample(grader, monkeypatch):
    with GraderPool(1, grader=grader) as graders:
        with monkeypatch.context() as patch:
            patch.setattr(pool.sys, "executable", "/no/such/python")
            assert graders.grade([request("right")]) == [None]
        assert graders.grade([request("right")]) == [1.0]
        assert graders.failures == {"crash": 1}


NO_MORE_FILES = """
import os, resource, sys, threading
from xbai.grading import CustomGrader, GradeRequest, GraderPool
from xbai.sandbox import forking
forking.PATIENCE_S = float(sys.argv[2])
most = resource.getrlimit(resource.RLIMIT_NOFILE)
with GraderPool(1, grader=CustomGrader(sys.argv[1])) as graders:
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), most[1]))
    later = threading.Timer(float(sys.argv[3]), resource.setrlimit, (resource.RLIMIT_NOFILE, most))
    later.start()
    print(graders.grade([GradeRequest("custom", "right", "right")] * 2), graders.failures)
    later.cancel()
    resource.setrlimit(resource.RLIMIT_NOFILE, most)
"""


@pytest.mark.parametrize(
    ("tries_for_s", "room_after_s", "grades"),
    [(60.0, 1.0, "[1.0, 1.0] Counter()"), (0.3, 100.0, "[None, None] Counter({'crash': 2})")],
)
def test_a_process_that_finds_no_room_is_tried_again(grader, tries_for_s, room_after_s, grades):
    command = [sys.executable, "-c", NO_MORE_FILES, grader.path, str(tries_for_s), str(room_after_s)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith(grades), done.stderr


def test_a_killed_pool_does_not_try_again(grader, monkeypatch):
    tried = threading.Event()
    monkeypatch.setattr(forking, "PATIENCE_S", 120.0)

    def no_room(*args, **kwargs):
        tried.set()
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(pool.subprocess, "Popen", no_room)
    graders = GraderPool(1, grader=grader)
    grade = graders.submit(request("right"))
    assert tried.wait(60)
    started = time.monotonic()
    graders.kill()
    assert time.monotonic() - started < 60
    assert grade.result().value is None


def test_a_worker_is_killed_while_its_thread_stops_it(grader):
    worker = pool._Worker(grader, 1.0, 2**30)

    class Stopped(subprocess.Popen):
        def poll(self):
            worker._process = None
            return super().poll()

    worker._process = process = Stopped(["sleep", "60"], start_new_session=True)
    worker.kill()
    assert process.wait(60) == -signal.SIGKILL


def test_a_hard_answer_times_out():
    with GraderPool(1, timeout_s=4.0) as pool:
        integral = GradeRequest("math500", "\\boxed{\\int \\frac{dx}{x^5+x+1}}", "x")
        assert pool.grade([integral, GradeRequest("math500", "\\boxed{2x}", "x+x")]) == [None, 1.0]
        assert pool.failures == {"timeout": 1}


@pytest.mark.parametrize(
    ("response", "answers", "status"), [("right", [Preparation, list], 0), ("hang", [Preparation], -14)]
)
def test_an_orphans_alarm_leaves_time_for_imports(tmp_path, response, answers, status):
    path = tmp_path / "slow.py"
    path.write_text("import time\ntime.sleep(1.5)\n" + HOSTILE, encoding="utf-8")
    ours, theirs = Pipe()
    code = f"from xbai.grading import worker; worker.ORPHAN_GRACE_S = 0.5; worker.main({theirs.fileno()})"
    with theirs:
        process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()])
    ours.send((CustomGrader(str(path)), 0.5, 2**30))
    ours.send((0, [request(response)]))
    assert [type(ours.recv()[1]) for _ in answers] == answers
    if status:
        with pytest.raises(EOFError):
            ours.recv()
    ours.close()
    assert process.wait(60) == status
