"""The driver and its services, killed again and again: nothing lost, nothing twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from driver_kills import kill_driver_and_services

pytestmark = pytest.mark.long


def test_twenty_kills_of_driver_and_services_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    assert kill_driver_and_services(tmp_path, 20) == {
        "driver_kills": 10,
        "service_kills": 10,
        "lost": 0,
        "silently_wrong": 0,
        "hung": 0,
    }
