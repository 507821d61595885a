"""Metrics at SwanLab."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from verl.utils.trackers.backend import SAMPLES, Backend, Table, TrackedRun


class SwanlabBackend(Backend):
    """A SwanLab run that a resumed training continues, as far as SwanLab does: one on this machine starts a folder anew
    under the same id, which `swanlab sync` unites.

    By SWANLAB_MODE, or else online with an API key; without one `local`, for `swanlab watch`, where its dashboard is
    installed, and `offline` where it is not.
    """

    def __init__(self, run: TrackedRun) -> None:
        import swanlab

        on_this_machine = "local" if find_spec("swanboard") else "offline"
        run_id = run.kept_id("swanlab") or uuid.uuid4().hex[:8]
        # Which values there are is for swanlab to say.
        mode: Any = os.environ.get("SWANLAB_MODE") or ("online" if swanlab.Settings().api_key else on_this_machine)
        self._run = swanlab.init(
            project=run.project,
            name=run.experiment,
            log_dir=str(run.folder / "swanlog"),
            config=dict(run.config),
            mode=mode,
            id=run_id,
            resume="allow",
        )
        run.keep_id("swanlab", run_id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def log_samples(self, samples: Table, step: int) -> None:
        import swanlab

        texts = ["\n\n".join(f"{name}:\n{value}" for name, value in sample.items()) for sample in samples]
        self._run.log({SAMPLES: [swanlab.Text(text) for text in texts]}, step=step)

    def close(self) -> None:
        self._run.finish()
