"""The shell scripts: they parse, set-up is idempotent, and what they cannot do here is one clear line."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = sorted(path for folder in ("scripts", "verl", ".ci") for path in (REPOSITORY / folder).rglob("*.sh"))


@pytest.mark.parametrize("script", [*SCRIPTS, REPOSITORY / ".ci/run"], ids=lambda path: path.name)
def test_script_parses_and_stops_at_the_first_error(script: Path):
    subprocess.run(["bash", "-n", script], check=True)
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.slow
def test_setup_is_idempotent_and_notices_changes(checkout):
    first_status, first_output = checkout.run("bash scripts/setup.sh")
    assert first_status == 0, first_output
    started = time.monotonic()
    status, output = checkout.run("bash scripts/setup.sh")
    assert (status, "is up to date" in output) == (0, True), output
    assert time.monotonic() - started < 5

    requirements = checkout.root / "requirements.txt"
    text = requirements.read_text()
    try:
        requirements.write_text(f"{text}no-such-package-of-this-test==1\n")
        status, output = checkout.run("bash scripts/setup.sh")
        assert status != 0
        assert "no-such-package-of-this-test" in output
        assert not (Path(checkout.environment["XBAI_VENV"]) / ".xbai-installed").exists()
    finally:
        requirements.write_text(text)


def test_setup_names_an_unknown_device(checkout):
    status, output = checkout.run("bash scripts/setup.sh", DEVICE="tpu")
    assert (status, output) == (2, "error: DEVICE=tpu is unknown, use cpu or cuda\n")


def test_setup_without_a_fitting_python_says_which(checkout, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "cat", "sha256sum", "cut", "grep"):
        path = subprocess.run(["bash", "-c", f"type -P {tool}"], capture_output=True, text=True, check=True).stdout
        (tools / tool).symlink_to(path.strip())
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
