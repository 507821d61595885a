"""Metrics at Weights & Biases."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from typing import Any

from verl.utils.trackers.backend import SAMPLES, Backend, Table, TrackedRun

logger = logging.getLogger(__name__)

STEP_METRIC = "trainer/step"
"""What wandb draws the others over: its own steps only rise, and a resumed run repeats some."""


class WandbBackend(Backend):
    """A wandb run that a resumed training continues; offline without an API key or a connection, or by WANDB_MODE.

    Steps that a resumed run repeats are there twice: wandb keeps what the interrupted one logged of them.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        run_id = run.kept_id("wandb") or uuid.uuid4().hex[:8]
        settings: dict[str, Any] = {"project": run.project, "name": run.experiment, "dir": str(run.folder)}
        settings |= {"id": run_id, "config": dict(run.config), "resume": "allow"}
        # Which values there are is for wandb to say.
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        try:
            self._run = wandb.init(**settings, mode=mode)
        except wandb.errors.CommError as error:
            logger.warning("wandb is not reachable (%s): logging offline, `wandb sync` uploads it later", error)
            self._run = wandb.init(**settings, mode="offline")
        self._run.define_metric(STEP_METRIC)
        self._run.define_metric("*", step_metric=STEP_METRIC)
        run.keep_id("wandb", run_id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log({**metrics, STEP_METRIC: step})

    def log_samples(self, samples: Table, step: int) -> None:
        import wandb

        table = wandb.Table(columns=list(samples[0]), data=[list(sample.values()) for sample in samples])
        self._run.log({SAMPLES: table, STEP_METRIC: step})

    def close(self) -> None:
        self._run.finish()
