"""Everything that is to withstand accidents and attacks, at once: what was lost, silently wrong, or hung.

    python bench/chaos.py [--scale 1.0] [--seed 0] [--out FILE]

Runs the benchmarks `driver_kills`, `training_kills`, `journal_flips`, `checkpoint_flips` and `hostile_bodies` one after
the other; `scale` multiplies how often each strikes. The last line is one JSON object: how many of each there were,
`lost`, `silently_wrong` and `hung` of all together, which are to be 0, `parts` as each benchmark gives them, and the
machine.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from checkpoint_flips import flip_checkpoint
from driver_kills import kill_driver_and_services
from hostile_bodies import attack
from journal_flips import flip_bits
from load import services_of, write_model
from machine import ROOT, describe_machine, report
from rich.logging import RichHandler
from training_kills import kill_training

logger = logging.getLogger(__name__)

KILLS, TRAINING_KILLS, JOURNAL_FLIPS, CHECKPOINT_FLIPS, ROUNDS_OF_BODIES = 32, 10, 600, 200, 62
LARGEST_BODY = 15_000_000
COUNTS = ("driver_kills", "service_kills", "training_kills", "journal_flips", "checkpoint_flips", "hostile_bodies")
DAMAGES = {
    "lost": ("lost",),
    "silently_wrong": ("silently_wrong", "not_named"),
    "hung": ("hung", "crashed"),
}
"""What of the parts adds up to what of the whole; a traceback is no better than a process that stands still."""

Part = Callable[[Path], dict[str, Any]]


def attack_services(folder: Path, rounds: int, seed: int) -> dict[str, Any]:
    """Start both services on a tiny model, and send them bodies of up to 15 MB, four at once."""
    services = services_of(write_model(folder / "model"), "hf", folder, max_pending=256)
    try:
        for service in services:
            asyncio.run(service.start())
        policy, score = (service.url for service in services)
        return asdict(attack(policy, score, rounds=rounds, at_once=4, size=LARGEST_BODY, seed=seed))
    finally:
        for service in services:
            if service.process is not None:
                service.process.kill()
                service.process.wait()


def main(
    scale: Annotated[float, typer.Option(min=0.05, help="of how often each strikes")] = 1.0,
    seed: Annotated[int, typer.Option(help="of all moments, bits and bodies")] = 0,
    out: Annotated[Path, typer.Option(help="the JSON file to write")] = ROOT / "bench/results/chaos.json",
) -> None:
    """Run them all."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    # A damaged journal is a line of the log, and here there are hundreds.
    logging.getLogger("xbai").setLevel(logging.ERROR)

    def times(count: int) -> int:
        return max(2, round(scale * count))

    parts: dict[str, Part] = {
        "journal": lambda folder: flip_bits(times(JOURNAL_FLIPS), seed),
        "checkpoint": lambda folder: flip_checkpoint(folder, times(CHECKPOINT_FLIPS), seed),
        "driver": lambda folder: kill_driver_and_services(folder, times(KILLS), seed),
        "services": lambda folder: attack_services(folder, times(ROUNDS_OF_BODIES), seed),
        "training": lambda folder: kill_training(folder, times(TRAINING_KILLS), seed),
    }
    found: dict[str, dict[str, Any]] = {}
    for name, part in parts.items():
        logger.info("%d of %d: %s", len(found) + 1, len(parts), name)
        with tempfile.TemporaryDirectory(prefix="chaos_") as folder:
            found[name] = part(Path(folder))
    counts = {name: sum(part.get(name, 0) for part in found.values()) for name in COUNTS}
    damages = {
        name: sum(part.get(column, 0) for part in found.values() for column in columns)
        for name, columns in DAMAGES.items()
    }
    report({**counts, **damages, "parts": found, "machine": describe_machine()}, out)


if __name__ == "__main__":
    typer.run(main)
