"""A copy of the working tree in which commands run as a newcomer would type them; what vLLM does under the hood."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
SETTINGS_OF_SCRIPTS = (
    *("OUT", "SEED", "PROBLEMS", "RANKS", "SFT_ARGS", "RL_ARGS", "MODEL", "TRAIN_FILES", "VAL_FILES", "NNODES"),
    *("SETTING", "TASK", "LANGUAGE_MODEL", "GSM8K", "QUESTIONS"),
    *("RAY_ADDRESS", "HOSTS_FILE", "LOCAL_DIR", "TARGET_DIR", "PYTEST_ADDOPTS", "COVERAGE"),
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

    def run(self, command: str, timeout_s: float = 600.0, **variables: str) -> tuple[int, str]:
        """Exit status and output of `command`."""
        process = self.start(command, **variables)
        try:
            status = process.wait(timeout_s)
        except (subprocess.TimeoutExpired, pytest.fail.Exception) as late:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise AssertionError(f"{command}: {late}\n{self._said()[-3000:]}") from late
        return status, self._said()

    def _said(self) -> str:
        return self.logs[-1].read_text(encoding="utf-8")

    def processes(self) -> dict[int, str]:
        """Command lines by process id of everything that commands of this copy have left running."""
        marker = f"XBAI_VENV={self.environment['XBAI_VENV']}".encode()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if marker in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_text(encoding="utf-8").replace("\0", " ")
            except OSError:  # it ended meanwhile, or is not ours to read
                continue
        return {pid: command for pid, command in found.items() if command}

    def wait_until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Return as soon as `condition` holds."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s\n{self._said()[-3000:]}"
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


class InstantStream:
    """Stands in for CUDA's streams and events: on a CPU, what a call began is done when it returns."""

    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...


@pytest.fixture(scope="session")
def async_scheduling() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """`with async_scheduling(): ...`: vLLM's engines schedule a step before they know the tokens of the one before.

    That is how they run on a GPU; on a CPU vLLM does not. Lists on the host then hold -1 for a token until the next
    step is on its way.
    """

    @contextlib.contextmanager
    def schedule_asynchronously() -> Iterator[None]:
        from vllm.platforms.cpu import CpuPlatform

        configure = CpuPlatform.check_and_update_config.__func__

        def configure_asynchronous(platform: type[CpuPlatform], vllm_config: Any) -> None:
            configure(platform, vllm_config)
            vllm_config.scheduler_config.async_scheduling = True

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CpuPlatform, "check_and_update_config", classmethod(configure_asynchronous))
            for name in ("Event", "Stream", "current_stream"):
                patch.setattr(torch.cuda, name, InstantStream)
            patch.setattr(torch.cuda, "stream", contextlib.nullcontext)
            yield

    return schedule_asynchronously


@pytest.fixture
def preemptions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the requests that vLLM takes out of the batch for want of memory."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempt, found = Scheduler._preempt_request, []

    def recording(self: Scheduler, request: Any, *args: Any, **kwargs: Any) -> None:
        found.append(request.request_id)
        preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", recording)
    return found
