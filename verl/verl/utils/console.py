"""How the trainers' logs look."""

from __future__ import annotations

import logging
import sys

from rich.logging import RichHandler


def log_to_console(level: int = logging.INFO) -> None:
    """Through rich on a terminal, where records must not tear the progress bar; plain lines in a file or pipe."""
    if sys.stdout.isatty():
        logging.basicConfig(level=level, format="%(message)s", handlers=[RichHandler(show_path=False)])
    else:
        logging.basicConfig(level=level, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
