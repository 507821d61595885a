"""The process behind `Sandbox`: forks one confined child for each job that arrives on file descriptor 0.

It imports little, and nothing that a submitted program should not see. Children have its memory; so what a job has, its
source, its input and its output, is never in it: the child reads the job, and the output passes through memory that is
given back before the next child is forked.
"""

from __future__ import annotations

import os
from multiprocessing.connection import Connection

from xbai.sandbox.confine import hide_memory, python_paths
from xbai.sandbox.program import compile_preamble
from xbai.sandbox.supervisor import OwnerEndedError, supervise


def main() -> None:
    """Serve until the other end closes."""
    connection = Connection(0)
    walls = connection.recv()
    python_paths()
    preamble = compile_preamble()
    hide_memory()
    while True:
        try:
            limits = connection.recv()
            supervise(connection, limits, preamble, walls)
        except (EOFError, OwnerEndedError):
            os._exit(0)
