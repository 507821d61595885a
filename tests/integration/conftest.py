"""A copy of the working tree in which commands run as a newcomer would type them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SETTINGS_OF_SCRIPTS = (
    *("OUT", "SEED", "PROBLEMS", "RANKS", "SFT_ARGS", "RL_ARGS", "MODEL", "TRAIN_FILES", "VAL_FILES", "NNODES"),
    *("RAY_ADDRESS", "HOSTS_FILE", "LOCAL_DIR", "TARGET_DIR", "PYTEST_ADDOPTS"),
)
# pip only says what it would install, and fails when something is missing from the environment.
REHEARSE_PIP = {"PIP_DRY_RUN": "1", "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}


@dataclass
class Checkout:
    """The copy; its commands share the environment's packages but no state with the machine's user."""

    root: Path
    environment: dict[str, str]
    logs: list[Path] = field(default_factory=list)

    def start(self, command: str, **variables: str) -> subprocess.Popen:
        """Run `command` in bash at the root, in a process group of its own; the output goes to `logs[-1]`."""
        self.logs.append(self.root.parent / f"command_{len(self.logs)}.log")
        with self.logs[-1].open("wb") as log:
            return subprocess.Popen(
                ["bash", "-c", command],
                cwd=self.root,
                env={**self.environment, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, command: str, timeout_s: float = 240.0, **variables: str) -> tuple[int, str]:
        """Exit status and output of `command`."""
        process = self.start(command, **variables)
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        return status, self.logs[-1].read_text()

    def processes(self) -> dict[int, str]:
        """Command lines by process id of everything that commands of this copy have left running."""
        marker = f"XBAI_VENV={self.environment['XBAI_VENV']}".encode()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if marker in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:  # it ended meanwhile, or is not ours to read
                continue
        return {pid: command for pid, command in found.items() if command}

    def wait_until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Return as soon as `condition` holds."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s\n{self.logs[-1].read_text()[-3000:]}"
            time.sleep(0.1)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """All files that git would commit, uncommitted changes too, beside a twin of the environment with its own stamp."""
    base = tmp_path_factory.mktemp("checkout")
    root, twin, home = base / "repository", base / "environment", base / "home"
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("needs a git checkout, to know which files belong to the repository")
    for name in filter(None, listing.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, root / name)
    twin.mkdir()
    home.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if not entry.name.startswith("."):
            (twin / entry.name).symlink_to(entry)
    inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS_OF_SCRIPTS}
    copy = Checkout(
        root,
        {
            **inherited,
            **REHEARSE_PIP,
            "XBAI_VENV": str(twin),
            "PATH": f"{twin}/bin:{os.environ['PATH']}",
            # The environment's own editable installs are of the original.
            "PYTHONPATH": f"{root}/verl:{root}",
            "HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        },
    )
    yield copy
    for pid in copy.processes():
        os.kill(pid, signal.SIGKILL)
