"""Metrics in trackio's dashboard."""

from __future__ import annotations

from collections.abc import Mapping

from verl.utils.trackers.backend import SAMPLES, Backend, Table, TrackedRun
from xbai.errors import UserError, one_line


class TrackioBackend(Backend):
    """A run of trackio, on this machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names a place.

    A resumed training goes on in the latest run of its name. Steps that it repeats are there twice.
    """

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        resume = "allow" if run.resume_step else "never"
        try:
            self._run = trackio.init(run.project, run.experiment, config=dict(run.config), resume=resume)
        except ValueError as error:
            raise UserError(f"trainer.logger: trackio cannot be used ({one_line(error)})") from error

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def log_samples(self, samples: Table, step: int) -> None:
        import trackio

        self._run.log({SAMPLES: trackio.Table(data=[dict(sample) for sample in samples])}, step=step)

    def close(self) -> None:
        self._run.finish()
