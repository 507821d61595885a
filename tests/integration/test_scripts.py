"""The shell scripts: they parse, set-up is idempotent, and what they cannot do here is one clear line."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = sorted(path for folder in ("scripts", "verl", ".ci") for path in (REPOSITORY / folder).rglob("*.sh"))


@pytest.mark.parametrize("script", [*SCRIPTS, REPOSITORY / ".ci/run"], ids=lambda path: path.name)
def test_script_parses_and_stops_at_the_first_error(script: Path):
    subprocess.run(["bash", "-n", script], check=True)
    assert "set -euo pipefail" in script.read_text(encoding="utf-8")


@pytest.mark.long
def test_setup_is_idempotent_and_notices_changes(checkout):
    stamp = Path(checkout.environment["XBAI_VENV"]) / ".xbai-installed"
    stamp.unlink(missing_ok=True)
    status, output = checkout.run("bash scripts/setup.sh")
    assert (status, stamp.exists()) == (0, True), output
    status, output = checkout.run("bash scripts/setup.sh")
    assert (status, output.count("\n"), "is up to date" in output) == (0, 1, True), output

    requirements = checkout.root / "requirements.txt"
    text = requirements.read_text(encoding="utf-8")
    try:
        requirements.write_text(f"{text}no-such-package-of-this-test==1\n", encoding="utf-8")
        status, output = checkout.run("bash scripts/setup.sh")
        assert status != 0
        assert "no-such-package-of-this-test" in output
        assert not stamp.exists()
    finally:
        requirements.write_text(text, encoding="utf-8")


def test_the_public_project_is_not_taken_for_the_trainer(checkout, tmp_path):
    package = tmp_path / "verl"
    package.mkdir()
    (package / "__init__.py").touch()
    path = f"{tmp_path}:{checkout.environment['PYTHONPATH']}"
    status, output = checkout.run("bash scripts/run_single_node.sh", PYTHONPATH=path)
    assert (status, output.count("\n")) == (2, 1)
    assert output.startswith("error: the trainer is not installed; run: bash scripts/setup.sh")
    assert "pip uninstall verl" in output


def test_setup_names_an_unknown_device(checkout):
    status, output = checkout.run("bash scripts/setup.sh", DEVICE="tpu")
    assert (status, output) == (2, "error: DEVICE=tpu is unknown, use cpu or cuda\n")


def write_program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path) -> Path:
    """A folder with what the scripts need of a machine; there is no Python, and no GPU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("bash", "dirname", "cat", "sha256sum", "cut", "date", "mkdir", "mv", "realpath", "rm"):
        path = subprocess.run(["bash", "-c", f"type -P {tool}"], capture_output=True, text=True, check=True).stdout
        (folder / tool).symlink_to(path.strip())
    return folder


@pytest.fixture
def gpu(tools: Path) -> Path:
    """The tools of a machine with a GPU."""
    write_program(tools / "nvidia-smi", "echo 'GPU 0: one that is not there'")
    return tools


def test_on_a_machine_with_gpus_each_build_of_vllm_has_its_environment(checkout, gpu: Path):
    def chosen(**variables: str) -> str:
        show = "source scripts/environment.sh; echo $device $venv ${CUDA_VISIBLE_DEVICES-all}"
        path = f"{gpu}:{os.environ['PATH']}"
        return checkout.run(show, **{"PATH": path, "XBAI_VENV": "", "DEVICE": "", **variables})[1].strip()

    assert chosen(CUDA_VISIBLE_DEVICES="1") == "cuda .venv 1"
    assert chosen(DEVICE="cpu", CUDA_VISIBLE_DEVICES="1") == "cpu .venv-cpu"
    assert chosen(DEVICE="cpu", XBAI_VENV="mine") == "cpu mine"


@pytest.mark.parametrize(("machine", "environment"), [("tools", ".venv"), ("gpu", ".venv-cpu")])
def test_the_quickstart_runs_on_the_cpu_of_any_machine(checkout, tmp_path, request, machine: str, environment: str):
    path = str(request.getfixturevalue(machine))
    status, output = checkout.run("bash scripts/quickstart.sh", PATH=path, XBAI_VENV="", OUT=str(tmp_path / "out"))
    assert status == 2
    assert f"Set-up → {environment}\n" in output.replace("\033[0m", "")


def test_setup_takes_the_cpu_build_of_torch_from_where_it_is(checkout, tmp_path):
    bin_folder, calls = tmp_path / "venv/bin", tmp_path / "calls"
    lacks_torch = "[[ $* != *torch==*+cpu* || $* == *--extra-index-url* ]]"
    write_program(bin_folder / "pip", f'echo "$*" >>{calls}\n{lacks_torch}')
    write_program(bin_folder / "python", "true")
    status, output = checkout.run("bash scripts/setup.sh", DEVICE="cpu", XBAI_VENV=str(bin_folder.parent))
    assert status == 0, output
    first, *others = [call for call in calls.read_text(encoding="utf-8").splitlines() if call.startswith("install ")]
    assert "--extra-index-url" not in first
    assert len(others) == 3
    assert all("--extra-index-url https://download.pytorch.org/whl/cpu" in call for call in others)


def nvidia_smi(tools: Path, driver: str, cuda: str) -> None:
    """A driver as `nvidia-smi -q` shows it."""
    shown = "\\n".join(f"{name} Version{' ' * 30}: {value}" for name, value in (("Driver", driver), ("CUDA", cuda)))
    write_program(tools / "nvidia-smi", f"[[ $1 == -L ]] && echo 'GPU 0: not there' || printf '{shown}\\n'")


@pytest.mark.parametrize(
    ("driver", "cuda", "has_cuda12", "installed"),
    [
        ("580.95.05", "13.0", False, ["torch==2.13.0", "vllm>=0.32,<0.33"]),
        # Newer libraries beside an older driver, as NVIDIA's containers have them: what runs decides.
        ("550.90.07", "13.0", False, ["torch==2.13.0", "vllm>=0.32,<0.33"]),
        ("550.90.07", "12.4", True, ["torch==2.13.0+cu129", "vllm==0.32.0+cu129"]),
        ("550.90.07", "12.4", False, None),
        ("470.82.01", "11.4", True, None),
    ],
)
def test_setup_installs_what_the_driver_runs(
    checkout, gpu: Path, tmp_path, driver: str, cuda: str, has_cuda12: bool, installed: list[str] | None
):
    nvidia_smi(gpu, driver, cuda)
    bin_folder, calls = tmp_path / "venv/bin", tmp_path / "calls"
    write_program(bin_folder / "pip", f'echo "$*" >>{calls}\n{"true" if has_cuda12 else "[[ $* != *cu129* ]]"}')
    write_program(bin_folder / "python", "true")
    variables = {"PATH": f"{gpu}:{os.environ['PATH']}", "DEVICE": "", "XBAI_VENV": str(bin_folder.parent)}
    status, output = checkout.run("bash scripts/setup.sh", **variables)
    if installed is None:
        assert status == 2, output
        (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert f"the NVIDIA driver here is {driver}, and torch for CUDA 13 needs 580 or newer: install that" in error
        assert not (bin_folder.parent / ".xbai-installed").exists()
        return
    assert status == 0, output
    made = [call.split() for call in calls.read_text(encoding="utf-8").splitlines()]
    assert all(name in installed for call in made for name in call if name.startswith(("torch==", "vllm")))
    assert [installed[1] in call for call in made].count(True) == 1 + has_cuda12


def test_setup_tries_the_gpu(checkout, gpu: Path, tmp_path):
    nvidia_smi(gpu, "580.95.05", "13.0")
    bin_folder = tmp_path / "venv/bin"
    write_program(bin_folder / "pip", "true")
    write_program(bin_folder / "python", "[[ $* != *cuda* ]] || { echo 'Error: no kernel image'; exit 1; }")
    variables = {"PATH": f"{gpu}:{os.environ['PATH']}", "DEVICE": "", "XBAI_VENV": str(bin_folder.parent)}
    status, output = checkout.run("bash scripts/setup.sh", **variables)
    assert status == 2
    assert output.splitlines()[-1] == (
        "error: torch cannot use the GPU: Error: no kernel image; it needs an NVIDIA driver of 580 or newer, "
        "and the one here is 580.95.05"
    )
    assert not (bin_folder.parent / ".xbai-installed").exists()


def test_setup_without_a_fitting_python_says_which(checkout, tools: Path, tmp_path):
    status, output = checkout.run("bash scripts/setup.sh", PATH=str(tools), XBAI_VENV=str(tmp_path / "none"))
    assert status == 2
    assert "Python 3.11, 3.12 or 3.13 is needed" in output


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("bash verl/examples/ray/run_worker_n.sh", "error: no hosts; usage"),
        ("bash verl/examples/ray/run_worker_n.sh -f missing.txt", "error: missing.txt: no such file of hosts"),
        ("bash verl/examples/ray/run_worker.sh", "error: whom to join?"),
        ("bash verl/examples/ray/run_worker.sh 127.0.0.1:1", "error: no Ray head answers at 127.0.0.1:1; start one"),
        ("bash verl/examples/ray/run_worker.sh no.such.host", "error: no Ray head answers at no.such.host:6379; start"),
        ("bash verl/scripts/model_merger.sh", "error: LOCAL_DIR (the checkpoint) and TARGET_DIR"),
    ],
)
def test_what_is_missing_is_said(checkout, command: str, complaint: str):
    status, output = checkout.run(command)
    assert status == 2
    assert output.startswith(complaint)
    assert output.count("\n") == 1
