"""Processes that outlive their Ray session: a killed run's agents stay for a minute or two, a stuck worker for ever."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

OWNER_FILE = "verl_run"
"""In the folder of a Ray session: the folder of the run that started it."""
NAMED = 8
"""So many in one line."""
KILLED_WITHIN_S = 10.0


def own_session(session: Path, folder: Path) -> None:
    """Have the processes of a Ray session known as those of the run in `folder`.

    Args:
        session: Ray's folder of it.
        folder: `trainer.default_local_dir`.
    """
    (session / OWNER_FILE).write_text(str(folder.resolve()), encoding="utf-8")


def end_orphans(folder: Path) -> None:
    """End what an earlier run in `folder`, on this machine, has left behind; a warning names what others have left."""
    folder = folder.resolve()
    own: list[psutil.Process] = []
    others: list[psutil.Process] = []
    for process, session in _orphans():
        (own if _owner(session) == str(folder) else others).append(process)
    if own:
        logger.warning("ending what a killed run of %s has left behind: %s", folder, _listed(own))
        for process in own:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(own, timeout=KILLED_WITHIN_S)
    if others:
        logger.warning(
            "a killed run has left processes on this machine: %s; Ray's agents end by themselves within minutes, "
            "others by kill -9",
            _listed(others),
        )


def _orphans() -> Iterator[tuple[psutil.Process, Path]]:
    """The processes of Ray whose session has no raylet, which starts and ends all others; each with its session."""
    processes = list(psutil.process_iter(["cmdline"]))
    raylets = [title for title in map(_title, processes) if "/raylet " in title]
    for process in processes:
        session = _session(process) if _title(process).startswith("ray::") else None
        if session is not None and not any(f"/{session.name}/" in raylet for raylet in raylets):
            yield process, session


def _session(process: psutil.Process) -> Path | None:
    """By its log; its environment and arguments are lost to its title."""
    try:
        opened = [Path(file.path) for file in process.open_files()]
    except (psutil.Error, OSError):  # another user's, or it has ended
        return None
    return next((folder for path in opened for folder in path.parents if folder.name.startswith("session_")), None)


def _owner(session: Path) -> str | None:
    try:
        return (session / OWNER_FILE).read_text(encoding="utf-8")
    except OSError:
        return None


def _title(process: psutil.Process) -> str:
    """As it was when the processes were listed."""
    return " ".join(process.info["cmdline"] or ())


def _listed(processes: list[psutil.Process]) -> str:
    """By their titles, such as "ray::DashboardAgent (process 4711), ray::IDLE (process 4712) and 3 more"."""
    names = ", ".join(f"{_title(process).split()[0]} (process {process.pid})" for process in processes[:NAMED])
    return names + (f" and {len(processes) - NAMED} more" if len(processes) > NAMED else "")
