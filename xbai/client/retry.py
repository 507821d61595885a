"""How long a request is tried."""

from dataclasses import dataclass
from typing import Annotated

import typer


@dataclass(frozen=True)
class RetryPolicy:
    """How long to keep trying.

    Attributes:
        max_attempts: tries of one request that reach a service and fail there (500, 504, time-out).
        patience_s: how long every copy may be out of reach, or full of the work of others, before giving up.
    """

    max_attempts: int = 5
    request_timeout_s: Annotated[float, typer.Option("--request_timeout", min=0.001)] = 3600.0
    """Seconds to an answer; then 504."""
    patience_s: Annotated[float, typer.Option("--patience", min=0)] = 300.0
    """Seconds to wait for an absent service."""
