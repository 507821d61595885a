"""Metrics in MLflow."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from verl.trainer.config.fields import leaves
from verl.utils.trackers.backend import SAMPLES, Backend, Table, TrackedRun
from xbai.errors import UserError, one_line

logger = logging.getLogger(__name__)

MOST_PARAMETERS = 100
"""As many as MLflow takes at once."""


class MlflowBackend(Backend):
    """A run of MLflow that a resumed training continues, at MLFLOW_TRACKING_URI or else in files in the run's folder.

    What a server does not take is left out with a warning. Steps that a resumed run repeats are there twice.
    """

    def __init__(self, run: TrackedRun) -> None:
        import mlflow

        uri = os.environ.get("MLFLOW_TRACKING_URI") or _files_in(run.folder)
        self._error = mlflow.MlflowException
        try:
            self._client = mlflow.MlflowClient(uri)
            self._id = run.kept_id("mlflow") or self._begun(run)
            self._client.update_run(self._id, status="RUNNING")
        except self._error as error:
            raise UserError(f"trainer.logger: mlflow at {uri} cannot be used ({one_line(error)})") from error
        run.keep_id("mlflow", self._id)

    def _begun(self, run: TrackedRun) -> str:
        from mlflow.entities import Param

        known = self._client.get_experiment_by_name(run.project)
        experiment = known.experiment_id if known else self._client.create_experiment(run.project)
        run_id = self._client.create_run(experiment, run_name=run.experiment).info.run_id
        parameters = [Param(name, str(value)) for name, value in leaves(run.config)]
        for first in range(0, len(parameters), MOST_PARAMETERS):
            self._client.log_batch(run_id, params=parameters[first : first + MOST_PARAMETERS])
        return run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now_ms = int(1000 * time.time())
        values = [Metric(_allowed(name), value, now_ms, step) for name, value in metrics.items()]
        with self._warned(f"step {step}"):
            self._client.log_batch(self._id, values)

    def log_samples(self, samples: Table, step: int) -> None:
        columns = {name: [sample[name] for sample in samples] for name in samples[0]}
        # One table grows, as MLflow's list of a run's tables has no room for one a step.
        with self._warned(f"samples of step {step}"):
            self._client.log_table(self._id, {"step": [step] * len(samples), **columns}, f"{SAMPLES}.json")

    def close(self) -> None:
        with self._warned("the end of the run"):
            self._client.set_terminated(self._id)

    @contextmanager
    def _warned(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            logger.warning("mlflow has not taken %s: %s", what, one_line(error))


def _files_in(folder: Path) -> str:
    """They need neither a database nor a server; MLflow wants to be asked for them."""
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    return (folder / "mlruns").absolute().as_uri()


def _allowed(name: str) -> str:
    """A metric's name in the characters that MLflow takes: `val/pass@1` is `val/pass_at_1`."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))
