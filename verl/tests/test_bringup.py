"""The bring-up: its runner survives its steps, its report is always whole, and its rehearsal passes on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from clocks import wait_until
from torch import Tensor
from torch.nn import functional

import verl.bringup.__main__ as command
from verl.bringup import kernels, machine, runs, scorer, throughput
from verl.bringup.report import Report
from verl.bringup.runner import Outcome, run_step
from verl.bringup.step import SUBJECTS, CheckFailed, Context, Step, all_steps, choose, require, step
from xbai.engine.packed_attention import Packing, packed_attention
from xbai.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = "scripts/check_gpu.sh"
NOT_NEEDED = (
    *("ray", "hydra", "omegaconf", "tensordict", "vllm", "datasets", "pyarrow", "pandas", "torchdata", "pebble"),
    *("fastapi", "uvicorn", "httpx", "wandb", "torchao", "accelerate", "math_verify", "matplotlib"),
    *("jaxtyping", "beartype"),
)
# Stands for a machine where none of these is installed.
WITHOUT = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *others: None if name.split(".")[0] in {missing} else find_spec(name, *others)
)
"""


@step(means="-")
def passes(context: Context) -> str:
    return f"on {context.device}"


@step(means="the figure is wrong")
def fails(context: Context) -> str:
    require(context.on_gpu, "0.5 is too much")
    return "0.1"


@step(means="a bug")
def raises(context: Context) -> str:
    return str({}["missing key"])


@step(means="a segmentation fault, say")
def kills_its_process(context: Context) -> str:
    os.write(2, b"last words\n")
    os.kill(os.getpid(), signal.SIGSEGV)
    return "never"


@step(means="it exits")
def exits(context: Context) -> str:
    os._exit(3)


@step(means="it hangs", limit_s=1.0)
def hangs(context: Context) -> str:
    child = subprocess.Popen(["sleep", "600"])
    (context.work / "child").write_text(str(child.pid), encoding="utf-8")
    time.sleep(600)
    return "never"


@step(means="it leaves a process")
def leaves_a_process(context: Context) -> str:
    (context.work / "child").write_text(str(subprocess.Popen(["sleep", "600"]).pid), encoding="utf-8")
    return "left one"


@step(means="-", needs=["no_such_module"])
def lacks_a_module(context: Context) -> str:
    return "never"


@step(means="-", needs=["gpu"])
def lacks_a_gpu(context: Context) -> str:
    return "never"


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context("cpu", 2, tmp_path)


@pytest.mark.parametrize(
    ("one", "status", "figure", "details"),
    [
        (passes, "pass", "on cpu", None),
        (fails, "fail", "0.5 is too much", "require(context.on_gpu"),
        (raises, "fail", "KeyError: 'missing key'", "Traceback"),
        (kills_its_process, "fail", "the process died of SIGSEGV", "in kills_its_process"),
        (exits, "fail", "the process ended with status 3 and no figure", ""),
        (hangs, "fail", "took longer than 1 s", ""),
        (lacks_a_module, "skipped", "needs no_such_module", None),
        (lacks_a_gpu, "skipped", "needs gpu", None),
    ],
    ids=lambda value: value.name if isinstance(value, Step) else "",
)
def test_however_a_step_ends_it_has_an_outcome(
    one: Step, status: str, figure: str, details: str | None, context: Context, tmp_path: Path
):
    outcome = run_step(one, context, tmp_path / "logs/step.log")
    assert (outcome.status, outcome.figure) == (status, figure)
    assert (outcome.details is None) if details is None else (details in outcome.details)
    assert outcome.seconds < 60


@pytest.mark.parametrize("one", [hangs, leaves_a_process], ids=lambda one: one.name)
def test_no_process_outlives_its_step(one: Step, context: Context, tmp_path: Path):
    run_step(one, context, tmp_path / "log")
    child = int((tmp_path / "child").read_text(encoding="utf-8"))

    def has_ended() -> bool:
        try:
            return psutil.Process(child).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_until(has_ended, "the child ends")


def test_a_spawned_process_runs_the_same_step(tmp_path: Path):
    context = Context("cpu", 2, tmp_path, start_method="spawn")
    [compilers] = [one for one in all_steps() if one.name == "compilers"]
    assert run_step(compilers, context, tmp_path / "log").status == "pass"


def test_the_report_is_whole_after_every_step(tmp_path: Path):
    path = tmp_path / "outputs/check.json"
    report = Report(path, {"device": "a GPU"})
    for number, outcome in enumerate([Outcome("pass", "1", 0.1234, 2.5), Outcome("fail", "2", details="why")], 1):
        report.add(fails, outcome)
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["device"] == "a GPU"
        assert not found["finished"]
        assert len(found["steps"]) == number
    assert found["steps"] == [
        {"name": "fails", "status": "pass", "figure": "1", "seconds": 0.12, "peak_gib": 2.5},
        {
            "name": "fails",
            "status": "fail",
            "figure": "2",
            "seconds": 0.0,
            "what_it_means": "the figure is wrong",
            "details": "why",
        },
    ]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_check_goes_on_after_any_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    steps = [kills_its_process, raises, hangs, lacks_a_gpu, passes]
    out = tmp_path / "check.json"
    report = command.check(steps, "cpu", out)
    statuses = [entry["status"] for entry in json.loads(out.read_text(encoding="utf-8"))["steps"]]
    assert statuses == ["fail", "fail", "fail", "skipped", "pass"]
    assert report.finished
    said = capsys.readouterr().out
    assert "REHEARSAL ON THE CPU" in said
    assert "[1/5] FAIL kills_its_process" in said
    assert "what it means: a segmentation fault, say" in said
    assert "died of SIGSEGV" in (tmp_path / "check.json").read_text(encoding="utf-8")


def test_steps_are_chosen_by_name_or_by_quickness():
    steps = [passes, Step(run=fails.run, means="-", quick=True)]
    assert [one.name for one in choose(steps, quick=True, only=None)] == ["fails"]
    assert choose(steps, quick=False, only=None) == steps
    assert choose(steps, quick=True, only=["passes"]) == [passes]
    with pytest.raises(UserError, match="--only nothing: no such step, use some of passes,fails"):
        choose(steps, quick=False, only=["passes", "nothing"])


def test_every_step_has_a_name_of_its_own_and_says_what_its_failure_means():
    steps = all_steps()
    assert len({one.name for one in steps}) == len(steps) > len(SUBJECTS)
    assert all(len(one.means) > 40 and one.run.__doc__ for one in steps)
    assert {one.name for one in steps if one.quick}.isdisjoint(one.name for one in steps if "vllm" in one.needs)


def _smi(folder: Path, *used: str) -> str:
    """A PATH with a `nvidia-smi` that says so of each GPU."""
    rows = "".join(f"{index}, GPU-{index}, {cell}\\n" for index, cell in enumerate(used))
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/bash\nprintf '{rows}'\n", encoding="utf-8")
    tool.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(("used", "expected"), [(("3", "70"), (3, 70)), (("[N/A]",), ()), ((), ())])
def test_memory_in_use_is_known_or_its_step_is_skipped(
    used: tuple[str, ...],
    expected: tuple[int, ...],
    context: Context,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("PATH", _smi(tmp_path, *used))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.used_mib() == expected
    on_gpu = replace(context, device="cuda", used_mib=machine.used_mib())
    outcome = run_step(runs.memory_is_free, on_gpu, tmp_path / "log")
    assert outcome.status == ("pass" if expected else "skipped")
    assert ("0 MiB more in use" if expected else "needs memory in use") in outcome.figure


@pytest.mark.parametrize(("totals", "has_room"), [(("81559",), True), (("24564",), False), (("[N/A]",), True)])
def test_a_small_gpu_skips_what_does_not_fit_it(
    totals: tuple[str, ...], has_room: bool, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", _smi(tmp_path, *totals))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    packed = throughput.throughput_packed
    assert packed.missing(replace(context, device="cuda")) == (None if has_room else "38 GiB")
    assert packed.missing(context) is None, "a rehearsal is tiny"


def test_memory_left_behind_is_noticed(context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs, "PATIENCE_S", 0.0)
    monkeypatch.setenv("PATH", _smi(tmp_path, "10", "5000"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    outcome = run_step(runs.memory_is_free, replace(context, device="cuda", used_mib=(10, 20)), tmp_path / "log")
    assert (outcome.status, outcome.figure) == ("fail", "4980 MiB more are in use than before the first step")


def test_a_check_that_fails_is_no_bug_of_the_step():
    with pytest.raises(CheckFailed, match="too far"):
        require(False, "too far")


# What the steps notice


def test_a_window_of_one_token_more_is_noticed(context: Context, monkeypatch: pytest.MonkeyPatch):
    def wider(*args: Any, sliding_window: int, **kwargs: Any) -> Any:
        return packed_attention(*args, sliding_window=sliding_window + 1, **kwargs)

    monkeypatch.setattr(kernels, "packed_attention", wider)
    with pytest.raises(CheckFailed, match="outputs are up to"):
        kernels.attention_window.run(context)


def test_a_causal_mask_aligned_to_the_first_key_is_noticed(context: Context, monkeypatch: pytest.MonkeyPatch):
    def aligned_to_first_key(module: Any, *states: Tensor, packing: Packing, **_: Any) -> tuple[Tensor, None]:
        query, key, value = packing.gather(*(x[0].transpose(0, 1) for x in states[:3]))
        parts = zip(query.split(packing.lengths), *(x.split(packing.key_lengths) for x in (key, value)), strict=True)
        attend = partial(functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        outputs = [attend(*(x.transpose(0, 1)[None] for x in part)) for part in parts]
        return torch.cat(outputs, dim=2).transpose(1, 2), None

    monkeypatch.setattr(kernels, "packed_attention", aligned_to_first_key)
    kernels.attention_grouped_heads.run(context)
    with pytest.raises(CheckFailed, match="outputs are up to"):
        kernels.attention_shared_prefixes.run(context)


def test_a_score_of_another_position_is_noticed(context: Context, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scorer, "STEP_IDS", (40, 41))
    plain = scorer._plain_score
    monkeypatch.setattr(
        scorer,
        "_plain_score",
        lambda model, head, one: plain(model, head, replace(one, positions=[at + 1 for at in one.positions])),
    )
    with pytest.raises(CheckFailed, match="scores are up to"):
        scorer.scores.run(context)


def test_memory_must_be_near_the_estimate():
    assert runs.judged_memory({"update": (9.0, 10.0)}) == "update 9.0 GiB, estimated 10.0"
    assert runs.judged_memory({"update": (5.0, 10.0)}, is_most=True)
    with pytest.raises(CheckFailed, match=r"log-prob 12\.0 GiB, estimated 10\.0; at most 15%"):
        runs.judged_memory({"update": (9.0, 10.0), "log-prob": (12.0, 10.0)})


@pytest.mark.parametrize(("peak", "fails"), [(989.0, True), (312.0, False), (None, False)])
def test_only_large_gpus_must_reach_a_utilisation(
    peak: float | None, fails: bool, context: Context, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(throughput, "_measure", lambda *_, **__: {"log-prob": 400.0, "update": 200.0})
    monkeypatch.setattr(throughput, "_peak", lambda _: peak)
    with pytest.raises(CheckFailed, match=r"update 20\.2% MFU") if fails else nullcontext():
        assert "update" in throughput.throughput_fastest.run(context)


# The rehearsals


def _check(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "XBAI_VENV": sys.prefix, **environment}
    command = ["bash", SCRIPT, "--device", "cpu", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)


def _rehearse(tmp_path: Path, *options: str, **environment: str) -> dict:
    out = tmp_path / "check_gpu.json"
    done = _check(*options, "--out", str(out), **environment)
    report = json.loads(out.read_text(encoding="utf-8"))
    failed = [entry for entry in report["steps"] if entry["status"] == "fail"]
    assert not failed, "\n".join(f"{entry['name']}: {entry['figure']}\n{entry['details']}" for entry in failed)
    assert done.returncode == 0, done.stderr
    assert "REHEARSAL ON THE CPU" in done.stdout
    assert report["finished"]
    assert report["rehearsal"]
    assert report["device"].startswith("CPU: ")
    for entry in report["steps"]:
        assert entry["status"] in ("pass", "skipped")
        assert entry["seconds"] >= 0
        assert isinstance(entry["figure"], str)
        assert "\n" not in entry["figure"]
    return report


@pytest.mark.long
def test_the_quick_part_rehearses_with_torch_and_transformers_alone(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT.format(missing=set(NOT_NEEDED)), encoding="utf-8")
    report = _rehearse(tmp_path, "--quick", PYTHONPATH=str(tmp_path))
    assert [entry["name"] for entry in report["steps"]] == [one.name for one in all_steps() if one.quick]
    skipped = {entry["name"] for entry in report["steps"] if entry["status"] == "skipped"}
    assert skipped <= {one.name for one in all_steps() if "gpu" in one.needs or "compiler" in one.needs}


@pytest.mark.long
def test_all_of_it_rehearses_on_the_cpu(tmp_path: Path):
    report = _rehearse(tmp_path)
    assert [entry["name"] for entry in report["steps"]] == [one.name for one in all_steps()]


def test_an_unknown_step_is_one_line():
    done = _check("--only", "nonsense")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --only nonsense: no such step, use some of torch_runs_kernels,")
    assert done.stderr.count("\n") == 1


def test_without_a_python_that_has_torch_it_is_one_line(tmp_path: Path):
    for tool in ("bash", "dirname", "realpath"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done = _check(PATH=str(tmp_path), XBAI_VENV=str(tmp_path / "none"))
    assert (done.returncode, done.stderr) == (2, "error: no python here; run: bash scripts/setup.sh\n")
    (tmp_path / "python3").write_text("#!/bin/bash\nexit 1\n", encoding="utf-8")
    (tmp_path / "python3").chmod(0o755)
    done = _check(PATH=str(tmp_path), XBAI_VENV=str(tmp_path / "none"))
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}/python3 lacks torch or transformers; run: bash scripts/setup.sh\n"
