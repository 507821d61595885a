"""Metrics in the log of the run."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from verl.utils.trackers.backend import Backend, TrackedRun

logger = logging.getLogger(__name__)


class ConsoleBackend(Backend):
    """One log record a step: a line for each part of the names before the slash, of `perf/` the speeds and shares."""

    def __init__(self, run: TrackedRun) -> None:
        """The log is there already."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        groups: dict[str, list[str]] = {}
        for name, value in metrics.items():
            group, _, short = name.rpartition("/")
            if group == "perf" and not short.endswith(("tokens_per_s", "_share")):
                continue
            groups.setdefault(group, []).append(f"{short} {value:.4g}")
        lines = [f"  {group or 'other'}: {', '.join(values)}" for group, values in groups.items()]
        logger.info("\n".join([f"step {step}", *lines]))

    def close(self) -> None:
        """Nothing is held."""
